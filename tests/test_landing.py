"""Experts computed while they land: the same bits in whatever pieces, and nothing of bytes that were wrong."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_disk import FaultyDisk
from loaded_models import PROMPT, check_health, loaded, make_pack
from test_moe_layer import BACKENDS, FORMATS, GPT_OSS, HIDDEN, Expert

from moe_offload import OffloadedModel
from moe_offload.errors import ExpertReadError, PackCorruptError
from moe_offload.offload.experts.landing import LandingRows, StepAhead, read_order
from moe_offload.offload.experts.weights import MlpParts, PartLayout
from moe_offload.offload.pack.manifest import LayerLayout
from moe_offload.offload.streaming import reader
from moe_offload.offload.streaming.read_queue import cut
from moe_offload.quant import get_format, kernels
from moe_offload.quant.activation import Activation
from moe_offload.quant.moe_layer import MoeStep

pytestmark = [pytest.mark.skipif(not BACKENDS, reason="no kernels were built"), pytest.mark.timeout(120)]
CHUNK_BYTES = 4096
SLOTS = [2, 3, 2]
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"hidden_size": 64, "intermediate_size": 512},
    "gpt_oss": {"hidden_size": 64, "intermediate_size": 256},
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.forced(request.param):
        yield request.param


# -- rows --


@pytest.mark.parametrize("spec", FORMATS)
@pytest.mark.parametrize(
    "activation", [GPT_OSS, Activation("sigmoid"), Activation("gelu", "none")], ids=lambda activation: activation.gating
)
def test_rows_in_pieces_are_those_of_one_call(backend: str, spec: str, activation: Activation) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, HIDDEN).bfloat16()
    for num_pieces, has_bias in ((1, True), (2, False)):
        experts = [Expert(spec, activation, has_bias=has_bias, num_pieces=num_pieces) for _ in range(2)]
        mlps = [(expert_idx, expert.mlp) for expert_idx, expert in enumerate(experts)]
        whole = MoeStep(activation, x, [1, 0], [0.5, 0.25])
        whole.compute(mlps)
        up_rows, down_rows = experts[0].mlp.up_rows, experts[0].mlp.down_rows
        for steps in (
            [(64, 0), (up_rows, 64)],
            [(up_rows - 64, 0)],
            [(up_rows, down_rows)],
            [(0, 0), (64, 0), (64, 0)],
        ):
            step = MoeStep(activation, x, [1, 0], [0.5, 0.25])
            for rows in steps:
                step.compute_ahead(1, mlps[1][1], *rows)
            step.compute(mlps)
            assert torch.equal(step.outputs, whole.outputs)
            assert torch.equal(step.result, whole.result)


def test_what_is_forgotten_is_computed_anew(backend: str) -> None:
    torch.manual_seed(0)
    expert = Expert("nf4", GPT_OSS)
    x = torch.randn(1, HIDDEN).bfloat16()
    whole, step = (MoeStep(GPT_OSS, x, [0], [1.0]) for _ in range(2))
    whole.compute([(0, expert.mlp)])
    packed = expert.up[0][2]
    right = packed.clone()
    packed[:4000] ^= 0x55
    step.compute_ahead(0, expert.mlp, 64, 0)
    packed.copy_(right)
    step.forget_ahead(0)
    step.compute([(0, expert.mlp)])
    assert torch.equal(step.result, whole.result)


# -- the order of chunks --


@pytest.mark.parametrize("spec", FORMATS)
def test_scales_come_before_codes(spec: str) -> None:
    shapes = {"gate_up#0": (512, 128), "gate_up#1": (512, 128), "down": (128, 512), "up_bias": (1024,)}
    specs = {name: "bf16" if len(shape) == 1 else spec for name, shape in shapes.items()}
    parts = [(name, shape, specs[name], get_format(specs[name]).nbytes(shape)) for name, shape in shapes.items()]
    described = LayerLayout.of("experts", 1, parts)
    layout = PartLayout(described.parts)
    order = read_order(layout, described.slot_bytes, CHUNK_BYTES)
    assert tuple(sorted(order, key=lambda chunk: chunk.start)) == cut(described.slot_bytes, CHUNK_BYTES)
    mlp = MlpParts(("gate_up",), "down", Activation("sigmoid"), "up_bias")
    rows = LandingRows(layout, mlp, order)
    table = [rows[count] for count in range(len(order) + 1)]
    assert table[0] == (0, 0)
    assert table[-1] == (1024, 128)
    assert all(up <= later_up and down <= later_down for (up, down), (later_up, later_down) in pairwise(table))
    assert all(up == 1024 or not down for up, down in table)
    assert len({up for up, _ in table}) > 8, "rows as they come"
    assert {down for _, down in table} == {0, 64, 128}
    for count, (up_rows, down_rows) in enumerate(table):
        landed = {at // 64 for chunk in order[:count] for at in chunk[::64]}
        stacked = [(piece, max(0, min(512, up_rows - 512 * i))) for i, piece in enumerate(layout.pieces["gate_up"])]
        for piece, ready in [*stacked, (layout.pieces["down"][0], down_rows)]:
            if ready:
                assert piece.packed is not None
                codes, scales = piece.begin + ready * piece.packed.row_bytes, piece.begin + piece.packed.codes_bytes
                assert landed.issuperset(range(piece.begin // 64, -(-codes // 64)))
                assert landed.issuperset(range(scales // 64, piece.end // 64))


def test_small_experts_are_read_from_the_beginning() -> None:
    described = LayerLayout.of("experts", 1, [("w", (64, 64), "nf4", get_format("nf4").nbytes((64, 64)))])
    assert read_order(PartLayout(described.parts), described.slot_bytes, CHUNK_BYTES) == (range(CHUNK_BYTES),)


# -- whole models --


class Ahead:
    """Counts what is computed ahead."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.computed = self.forgotten = 0
        compute, forget = StepAhead.compute, StepAhead.forget

        def counted(ahead: StepAhead, *args: Any) -> None:
            self.computed += 1
            compute(ahead, *args)

        def counted_forget(ahead: StepAhead, expert_idx: int) -> None:
            self.forgotten += 1
            forget(ahead, expert_idx)

        patch.setattr(StepAhead, "compute", counted)
        patch.setattr(StepAhead, "forget", counted_forget)


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Ahead:
    monkeypatch.setitem(reader.ExpertReader.__init__.__kwdefaults__, "chunk_bytes", CHUNK_BYTES)
    monkeypatch.setattr(reader, "BACKOFF_S", (0.0, 0.0))
    return Ahead(monkeypatch)


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Of each family a pack, and its answer with all experts resident."""
    made = {}
    for family, shape in FAMILIES.items():
        pack = make_pack(tmp_path_factory.mktemp(family), family, **shape)
        with loaded(pack, [8, 8, 8], prefetch="off") as model:
            made[family] = pack, generated(model)
    return made


def generated(model: OffloadedModel) -> str:
    return model.generate(PROMPT, max_new_tokens=10)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefetch", ["off", 2])
@pytest.mark.parametrize("slots", [SLOTS, [1, 1, 1]], ids=["slots", "staging"])
def test_the_answer_is_that_of_all_resident(
    packs: dict[str, tuple[Path, str]], ahead: Ahead, family: str, prefetch: str | int, slots: list[int]
) -> None:
    disk = FaultyDisk()
    disk.delay_reads(0.001)
    pack, answer = packs[family]
    with loaded(pack, slots, disk, prefetch=prefetch) as model:
        assert generated(model) == answer
        assert ahead.computed
        check_health(model)


def test_a_byte_that_was_wrong_leaves_nothing_behind(packs: dict[str, tuple[Path, str]], ahead: Ahead) -> None:
    disk = FaultyDisk()
    disk.delay_reads(0.001)
    pack, answer = packs["mixtral"]
    with loaded(pack, SLOTS, disk, prefetch="off", verify="always") as model:
        for layer in model.manifest.layers:
            for expert in layer.experts.values():
                disk.flip_byte(expert.file, expert.offset_bytes + 100, times=1)
        assert generated(model) == answer
        assert ahead.forgotten
        check_health(model)


def test_a_byte_that_stays_wrong_ends_the_answer(packs: dict[str, tuple[Path, str]], ahead: Ahead) -> None:
    disk = FaultyDisk()
    pack, answer = packs["mixtral"]
    with loaded(pack, SLOTS, disk, prefetch="off", verify="always") as model:
        for expert in model.manifest.layers[1].experts.values():
            disk.flip_byte(expert.file, expert.offset_bytes + model.manifest.layers[1].slot_bytes - 5000)
        with pytest.raises(PackCorruptError, match="damaged"):
            generated(model)
        disk.heal()
        assert generated(model) == answer
        check_health(model)


def test_an_error_in_the_middle_of_an_expert(packs: dict[str, tuple[Path, str]], ahead: Ahead) -> None:
    disk = FaultyDisk()
    disk.delay_reads(0.001)
    pack, answer = packs["mixtral"]
    with loaded(pack, SLOTS, disk, prefetch=1) as model:
        generated(model)
        for layer in model.manifest.layers:
            for expert in layer.experts.values():
                disk.fail_reads(expert.file, offset_bytes=expert.offset_bytes + 6 * CHUNK_BYTES, size_bytes=1)
        with pytest.raises(ExpertReadError):
            generated(model)
        disk.heal()
        assert generated(model) == answer
        check_health(model)


def test_an_interrupt_in_the_middle_of_an_expert(
    packs: dict[str, tuple[Path, str]], ahead: Ahead, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FaultyDisk()
    disk.delay_reads(0.001)
    pack, answer = packs["mixtral"]
    with loaded(pack, SLOTS, disk, prefetch=1) as model:
        compute = StepAhead.compute

        def interrupted(*args: Any) -> None:
            compute(*args)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(StepAhead, "compute", interrupted)
            with pytest.raises(KeyboardInterrupt):
                generated(model)
        assert generated(model) == answer
        check_health(model)
