"""Whole models on the CUDA path, with a fake device in place of the GPU and everything else as it is."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda_model import Load, loading_on_fake_devices, tier_of
from fake_device import FakeDevice
from families import make_config
from family_runs import CONTEXT_TOKENS, example_inputs, run_logits, save_random_model

from moe_offload import OffloadedModel
from moe_offload.cache import EventKind
from moe_offload.errors import BudgetError
from moe_offload.offload.experts import layer as expert_layer
from moe_offload.offload.experts.host_values import to_host
from moe_offload.offload.pack.packer import pack_model

FAMILIES = ["mixtral", "gpt_oss", "nllb_moe"]


@pytest.fixture(scope="module", params=FAMILIES)
def pack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = save_random_model(make_config(request.param), folder / "checkpoint")
    return pack_model(str(checkpoint), folder / "pack", format="source")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    with loading_on_fake_devices(monkeypatch) as load:
        yield load


@pytest.mark.parametrize(
    ("slots", "host_slots", "prefetch"), [(0, 0, 0), (0, 4, 1), (4, 12, 0), (8, 4, 2), (1000, 1000, 1)]
)
def test_logits_are_the_cpus_to_rounding_and_no_budget_changes_a_bit(
    pack: Path, load: Load, slots: int, host_slots: int, prefetch: int
):
    with OffloadedModel.from_pretrained(pack, device="cpu", dtype="float32", context_tokens=CONTEXT_TOKENS) as resident:
        inputs = example_inputs(resident.model.config)
        expected = run_logits(resident.model, inputs)
        slot_bytes = resident.plan.staging_slot_bytes
    model = load(pack, slots_bytes=slots * slot_bytes, host_bytes=host_slots * slot_bytes, prefetch=prefetch)
    tokens, logits = run_logits(model.model, inputs)
    resident_tokens, resident_logits = run_logits(load(pack, slots_bytes=1 << 30, host_bytes=0).model, inputs)
    assert torch.equal(tokens, resident_tokens)
    assert torch.equal(logits, resident_logits)
    torch.testing.assert_close(logits, expected[1], rtol=1e-4, atol=1e-4)
    tier = tier_of(model)
    assert not tier.queues[0].hazards
    if slots == 1000:  # all in VRAM: each expert came once
        assert sum(model.plan.num_host_slots) == 0
        assert tier.bytes_copied == tier.bytes_read <= model.manifest.expert_bytes
    elif host_slots > slots:  # host memory gave what VRAM had no room for
        assert tier.bytes_copied > tier.bytes_read > 0
        assert any(tier.host.resident(layer_idx) for layer_idx in range(len(model.manifest.layers)))
    model._residency.cache.check_integrity()
    tier.host.check_integrity()
    assert model.stats.bytes_copied == tier.bytes_copied


def test_two_generations_at_once(pack: Path, load: Load):
    model = load(pack, slots_bytes=0, host_bytes=4 * 16384, seed=3, prefetch=1)
    inputs = [example_inputs(model.model.config, batch_size=1, num_tokens=5 + 3 * turn) for turn in range(2)]
    alone = [run_logits(model.model, each) for each in inputs]
    together: list[Any] = [None, None]

    def run(turn: int) -> None:
        together[turn] = run_logits(model.model, inputs[turn])

    threads = [threading.Thread(target=run, args=(turn,)) for turn in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for turn in range(2):
        assert torch.equal(together[turn][0], alone[turn][0])
        assert torch.equal(together[turn][1], alone[turn][1])
    assert not tier_of(model).queues[0].hazards


def test_a_tier_that_cannot_be_had_leaves_no_threads(pack: Path, load: Load, monkeypatch: pytest.MonkeyPatch):
    def refuse(device: FakeDevice, size_bytes: int) -> torch.Tensor:
        raise BudgetError("the device refuses", needed_bytes=size_bytes, budget_bytes=0)

    monkeypatch.setattr(FakeDevice, "allocate", refuse)
    with pytest.raises(BudgetError, match="the device refuses"):
        load(pack, slots_bytes=0, host_bytes=0)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("expert-reader")]


class Elsewhere(torch.Tensor):
    """A tensor that says it is on the device."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_copy_brings_ids_weights_and_predictions(dtype: torch.dtype):
    tensors = [
        torch.tensor([3, 0, 2**31]),
        torch.tensor([0.1, 1 / 3, 0.7]).to(dtype),
        torch.tensor([[1, 2], [3, 4]], dtype=torch.int32),
    ]
    assert all(found is tensor for found, tensor in zip(to_host(tensors), tensors, strict=True))
    for found, tensor in zip(to_host([tensor.as_subclass(Elsewhere) for tensor in tensors]), tensors, strict=True):
        assert found.dtype == tensor.dtype
        assert found.tolist() == tensor.tolist()


def test_a_step_that_looks_ahead_waits_once_a_layer(pack: Path, load: Load, monkeypatch: pytest.MonkeyPatch):
    """All that comes to the host in a decode step is what its routers chose, and with it what later ones will."""
    waits: list[int] = []
    brought: list[torch.Tensor] = []

    def counted(tensors: Any) -> list[torch.Tensor]:
        waits.append(len(tensors))
        brought.extend(to_host([tensor.as_subclass(Elsewhere) for tensor in tensors]))
        return brought[-len(tensors) :]

    model = load(pack, slots_bytes=4 * 16384, host_bytes=8 * 16384, prefetch=2)
    inputs = example_inputs(model.model.config, batch_size=1, num_tokens=5)
    expected = run_logits(model.model, inputs)
    lookahead = model._meter._lookahead
    prefetch = lookahead._prefetch

    def without_waiting(layer_idx: int, target_idx: int, ids: list[int]) -> None:
        assert any(ids == tensor.reshape(-1).tolist() for tensor in brought), "it would be waited for once more"
        prefetch(layer_idx, target_idx, ids)

    monkeypatch.setattr(lookahead, "_prefetch", without_waiting)
    monkeypatch.setattr(expert_layer, "to_host", counted)
    with model.tracing() as recording:
        tokens, logits = run_logits(model.model, inputs)
    assert torch.equal(tokens, expected[0])
    assert torch.equal(logits, expected[1])
    asked = [EventKind(kind) for kind in recording.trace.event_kind.tolist()]
    assert len(waits) == sum(kind in (EventKind.ACQUIRE, EventKind.ACQUIRE_IF_HOTTER) for kind in asked)
    if model.model.config.model_type == "mixtral":
        assert max(waits) == 4, "ids, weights, and the choices of two later layers"
        assert model.stats.prefetch_recall > 0
    assert not tier_of(model).queues[0].hazards
