"""Whole models whose misses are computed on the CPU, beside a fake device."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_cuda_model import Load, loading_on_fake_devices, tier_of
from families import make_config
from family_runs import CONTEXT_TOKENS, example_inputs, run_logits, save_random_model

from moe_offload import OffloadedModel
from moe_offload.offload.experts import step_tuning
from moe_offload.offload.pack.packer import pack_model

FAMILIES = ["mixtral", "gpt_oss", "nllb_moe", "longcat_flash", "dbrx", "llama4_text"]
SLOT_BYTES = 16384


@pytest.fixture(scope="module", params=FAMILIES)
def pack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = save_random_model(make_config(request.param), folder / "checkpoint")
    return pack_model(str(checkpoint), folder / "pack", format="nf4")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    return pack_model(str(save_random_model(make_config("mixtral"), folder / "checkpoint")), folder / "pack")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    with loading_on_fake_devices(monkeypatch) as load:
        yield load


def check(model: OffloadedModel) -> None:
    """Nothing is held, nothing contradicts itself, nobody has written where somebody read."""
    residency, tier = model._residency, tier_of(model)
    assert not tier.queues[0].hazards
    residency.cache.check_integrity()
    tier.host.check_integrity()
    assert not residency.cache._leases
    assert not residency._loads
    assert residency._num_behind == 0
    assert residency._free_staging.qsize() == tier.num_staging_slots


@pytest.mark.parametrize("miss_path", ["cpu", "split", "auto"])
@pytest.mark.parametrize("host_slots", [6, 60])
def test_logits_are_those_of_copying(
    pack: Path, load: Load, miss_path: str, host_slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_tuning, "TRIAL_STEPS", 2)
    with OffloadedModel.from_pretrained(pack, device="cpu", dtype="float32", context_tokens=CONTEXT_TOKENS) as resident:
        inputs = example_inputs(resident.model.config)
        expected = run_logits(resident.model, inputs)
        slot_bytes = resident.plan.staging_slot_bytes
    budgets = {"slots_bytes": 4 * slot_bytes, "host_bytes": host_slots * slot_bytes}
    model = load(pack, **budgets, miss_path=miss_path, prefetch=1)
    tokens, logits = run_logits(model.model, inputs)
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(logits, expected[1], rtol=1e-4, atol=1e-4)
    by_cpu = model.stats.computed_on_cpu
    assert (by_cpu > 0) == (model.model.config.model_type != "llama4_text"), "its experts are scored before they run"
    assert model.stats.bytes_read > 0
    wait_for_the_device(model)
    check(model)


def wait_for_the_device(model: OffloadedModel) -> None:
    """Until what was brought behind is there."""
    done = threading.Event()
    for _ in range(500):
        if not model._residency._loads:
            return
        done.wait(0.01)
    raise AssertionError(f"still loading: {model._residency._loads}")
