"""Whole models whose misses are computed on the CPU, beside a fake device."""

import itertools
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda_model import Load, loading_on_fake_devices, tier_of
from families import make_config
from family_runs import CONTEXT_TOKENS, example_inputs, run_logits, save_random_model
from faulty_disk import FaultyDisk
from loaded_models import wait_for_loads

from moe_offload import OffloadedModel
from moe_offload.errors import ConfigError, ExpertReadError
from moe_offload.offload.experts import step_tuning
from moe_offload.offload.experts.host_step import HostStep
from moe_offload.offload.pack.packer import pack_model
from moe_offload.offload.streaming import reader

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
    assert all(len(pool._free) == len(pool._made) for pool in tier._rows), "rows that no step gave back"
    assert residency._free_staging.qsize() == tier.num_staging_slots


@pytest.mark.parametrize("miss_path", ["cpu", "split", "auto"])
@pytest.mark.parametrize("host_slots", [6, 60])
def test_logits_are_those_of_copying(
    pack: Path, load: Load, miss_path: str, host_slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_tuning, "TRIAL_STEPS", 2)
    monkeypatch.setattr(step_tuning, "LEADING_STEPS", 2)
    with OffloadedModel.from_pretrained(pack, device="cpu", dtype="float32", context_tokens=CONTEXT_TOKENS) as resident:
        inputs = example_inputs(resident.model.config)
        expected = run_logits(resident.model, inputs)
        slot_bytes = resident.plan.staging_slot_bytes
    budgets = {"slots_bytes": 4 * slot_bytes, "host_bytes": host_slots * slot_bytes}
    model = load(pack, **budgets, miss_path=miss_path, prefetch=1)
    tier_of(model).queues[0].copy_s_per_byte = 3e-9  # about what these small experts take the CPU
    tokens, logits = run_logits(model.model, inputs)
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(logits, expected[1], rtol=1e-4, atol=1e-4)
    by_cpu = model.stats.computed_on_cpu
    if model.model.config.model_type == "llama4_text":  # its rows are scored before they reach the experts
        assert by_cpu == 0
    elif miss_path != "auto":  # whose trials may not meet a miss
        assert by_cpu > 0
    assert model.stats.bytes_read > 0
    wait_for_loads(model)
    check(model)


def budgets(num_slots: int, num_host_slots: int) -> dict[str, int]:
    return {"slots_bytes": num_slots * SLOT_BYTES, "host_bytes": num_host_slots * SLOT_BYTES}


def decode(model: OffloadedModel, num_tokens: int = 20, batch_size: int = 1) -> Any:
    inputs = example_inputs(model.model.config, batch_size, 1)
    return model.model.generate(**inputs, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False)


def test_what_is_asked_for_again_and_again_gets_a_slot(mixtral: Path, load: Load) -> None:
    """The CPU computes a miss at once; what is hotter than a resident one is brought for the next time."""
    model = load(mixtral, **budgets(0, 100), miss_path="cpu", prefetch="off")
    decode(model, 30)
    wait_for_loads(model)
    stats, tier = model.stats, tier_of(model)
    assert 0 < stats.computed_on_cpu == stats.misses
    assert stats.hits > 0
    copies = stats.bytes_copied / tier.expert_bytes(0)
    assert 0 < copies < stats.misses, "some are worth a slot, and not all"
    check(model)


@pytest.mark.parametrize(("batch_size", "is_few"), [(3, True), (9, False)])
def test_many_rows_are_copied(mixtral: Path, load: Load, batch_size: int, is_few: bool) -> None:
    model = load(mixtral, **budgets(0, 100), miss_path="cpu", prefetch="off")
    decode(model, 5, batch_size)
    assert (model.stats.computed_on_cpu > 0) == is_few
    wait_for_loads(model)
    check(model)


def test_two_threads_at_once(mixtral: Path, load: Load) -> None:
    model = load(mixtral, **budgets(2, 8), miss_path="split", prefetch=1, seed=3)
    alone = [decode(model, 12, batch_size) for batch_size in (1, 2)]
    together: list[Any] = [None, None]

    def run(turn: int) -> None:
        together[turn] = decode(model, 12, turn + 1)

    threads = [threading.Thread(target=run, args=(turn,)) for turn in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for turn in range(2):
        assert torch.equal(together[turn], alone[turn])
    wait_for_loads(model)
    check(model)


def test_a_disk_that_fails_leaves_everything_in_order(
    mixtral: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FaultyDisk()
    monkeypatch.setattr(reader, "DirectDisk", lambda: disk)
    monkeypatch.setattr(reader, "BACKOFF_S", (0.0, 0.0))
    model = load(mixtral, **budgets(0, 6), miss_path="cpu", prefetch=1)
    expected = decode(model, 12)
    for layer in model.manifest.layers:
        disk.fail_reads(layer.experts[0].file)
    with pytest.raises(ExpertReadError):
        decode(model, 40, 4)
    wait_for_loads(model)
    check(model)
    disk.heal()
    assert torch.equal(decode(model, 12), expected)
    wait_for_loads(model)
    check(model)


def test_ctrl_c_while_the_cpu_computes(mixtral: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(mixtral, **budgets(0, 8), miss_path="cpu", prefetch=1)
    expected = decode(model, 12)
    compute = HostStep.compute
    calls = itertools.count()

    def interrupted(step: HostStep, experts: Any) -> float:
        if next(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return compute(step, experts)

    with monkeypatch.context() as patch:
        patch.setattr(HostStep, "compute", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decode(model, 12)
    assert next(calls) > 5
    assert torch.equal(decode(model, 12), expected)
    wait_for_loads(model)
    check(model)


def test_a_trace_says_how_misses_were_computed(mixtral: Path, load: Load) -> None:
    model = load(mixtral, **budgets(0, 100), miss_path="split")
    with model.tracing() as recording:
        decode(model, 4)
    assert recording.trace.meta["miss_path"] == "split"
    assert model.miss_path == "split"


def test_without_a_gpu_auto_has_nothing_to_choose(mixtral: Path) -> None:
    with OffloadedModel.from_pretrained(mixtral, device="cpu", miss_path="auto", context_tokens=64) as model:
        assert model.miss_path == "copy"
    with pytest.raises(ConfigError, match="leave the option out"):
        OffloadedModel.from_pretrained(mixtral, device="cpu", miss_path="cpu", context_tokens=64)
