"""Which kernels compute from slots on a device, and bitsandbytes' in the place of Triton's."""

import math

import pytest
import torch
from slot_slabs import GPT_OSS, SILU, assert_near, random_slab

from moe_offload.quant.activation import Activation
from moe_offload.quant.slot_kernels import bitsandbytes_kernels, choice, slot_kernels
from moe_offload.quant.slot_kernels.bitsandbytes_kernels import BitsandbytesKernels

SLOTS = torch.tensor([[3, 0], [1, -1]], dtype=torch.int32)


def gemv_on_cpu(x, codes, shape, scales, table, block):
    """By bitsandbytes' own way of reading the bytes; its product with a vector wants other bytes on a CPU."""
    kind = "nf4" if float(table[0]) == -1 else "fp4"
    return x @ torch.ops.bitsandbytes.dequantize_4bit(codes, scales, block, kind, shape, x.dtype).T


@pytest.mark.parametrize(
    ("spec", "hidden", "activation", "bias"),
    [
        ("nf4", 128, SILU, None),
        ("nf4", 70, GPT_OSS, "bf16"),
        ("bnb-nf4-64", 128, SILU, None),
        ("bnb-fp4-128", 128, Activation("relu", "none"), "fp32"),
    ],
)
def test_bitsandbytes_computes_few_rows(
    monkeypatch: pytest.MonkeyPatch, spec: str, hidden: int, activation: Activation, bias: str | None
) -> None:
    monkeypatch.setattr(bitsandbytes_kernels, "_gemv", gemv_on_cpu)
    slab = random_slab(spec, hidden=hidden, inner=128, activation=activation, bias=bias)
    assert bitsandbytes_kernels.takes(slab.mlp)
    x, outputs = torch.randn(2, hidden).bfloat16(), torch.full((2, 2, hidden), math.nan)
    BitsandbytesKernels().decode_experts(slab.mlp, slab.data, SLOTS, x, outputs)
    for row, k in SLOTS.ge(0).nonzero().tolist():
        assert_near(outputs[row, k], slab.reference(int(SLOTS[row, k]), x[row]), 1e-3)
    assert outputs[1, 1].isnan().all()


@pytest.mark.parametrize("spec", ["nf4", "bnb-nf4-32", "bnb-fp4-64"])
def test_bitsandbytes_is_called_as_it_wants(spec: str) -> None:
    """By its own description of the product, which checks shapes and dtypes; it computes nothing."""
    slab = random_slab(spec, hidden=128, inner=192, num_slots=1)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.empty(1, 128, dtype=dtype, device="meta")
        output = BitsandbytesKernels().expert_output(slab.mlp, slab.data[0].to("meta"), x)
        assert (output.shape, output.dtype) == ((1, 128), dtype)
    arguments = [argument.name for argument in torch.ops.bitsandbytes.gemv_4bit.default._schema.arguments]
    assert arguments == ["A", "B", "shapeB", "absmax", "code", "blocksize"]


@pytest.mark.parametrize("spec", ["int4", "mxfp4", "int8", "bf16"])
def test_bitsandbytes_is_not_given_other_codes(spec: str) -> None:
    assert not bitsandbytes_kernels.takes(random_slab(spec).mlp)


class FakeTriton:
    """In the place of a device's kernels; ``error``: what trying them out raises."""

    name = "triton"

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def check(self, mlp: object) -> None:
        from moe_offload.quant.slot_kernels.triton_mlp import packed_mlp

        packed_mlp(mlp)

    def try_out(self) -> None:
        if self.error is not None:
            raise self.error


def choose(monkeypatch: pytest.MonkeyPatch, spec: str, *, capability=(8, 6), triton=FakeTriton, has_triton=True):
    """On a GPU that is not here."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GTX 1080")
    monkeypatch.setattr(choice, "find_spec", lambda name: object() if has_triton else None)
    monkeypatch.setattr(choice, "_triton_kernels", lambda device: triton())
    choice.triton_obstacle.cache_clear()
    try:
        return slot_kernels(torch.device("cuda"), random_slab(spec, num_slots=1).mlp)
    finally:
        choice.triton_obstacle.cache_clear()


def test_triton_is_chosen_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    chosen = choose(monkeypatch, "nf4")
    assert (chosen.kernels.name, chosen.reason) == ("triton", "Triton kernels on GTX 1080")


@pytest.mark.parametrize(("spec", "name"), [("nf4", "bitsandbytes"), ("int8", "torch")])
def test_what_is_chosen_in_its_place(monkeypatch: pytest.MonkeyPatch, spec: str, name: str) -> None:
    chosen = choose(monkeypatch, spec, has_triton=False)
    assert chosen.kernels.name == name
    assert "Triton is not installed" in chosen.reason
    chosen = choose(monkeypatch, spec, capability=(6, 1))
    assert chosen.kernels.name == name
    assert "need compute capability 7.5, GTX 1080 has 6.1" in chosen.reason
    chosen = choose(monkeypatch, spec, triton=lambda: FakeTriton(RuntimeError("Failed to find C compiler.\nSet CC")))
    assert chosen.kernels.name == name
    assert chosen.reason.endswith("could not build a kernel: RuntimeError: Failed to find C compiler.")


def test_a_format_that_triton_does_not_read_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    chosen = choose(monkeypatch, "fp8-8x8")
    assert chosen.kernels.name == "torch"
    assert "multiple of 16" in chosen.reason


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ["nf4", "bnb-nf4-64", "bnb-fp4-64"])
def test_bitsandbytes_on_a_gpu(spec: str) -> None:
    slab = random_slab(spec, hidden=512, inner=256)
    x, outputs = torch.randn(2, 512), torch.empty(2, 2, 512, device="cuda")
    BitsandbytesKernels().decode_experts(slab.mlp, slab.data.cuda(), SLOTS.cuda(), x.cuda(), outputs)
    for row, k in SLOTS.ge(0).nonzero().tolist():
        assert_near(outputs[row, k].cpu(), slab.reference(int(SLOTS[row, k]), x[row]), 1e-3)


def test_a_cpu_has_plain_torch() -> None:
    assert choice.device_kernels(torch.device("cpu")).startswith("bitsandbytes or plain torch (Triton's kernels need")
    chosen = slot_kernels(torch.device("cpu"), random_slab("nf4", num_slots=1).mlp)
    assert chosen.kernels.name == "torch"
    assert "the device is cpu" in chosen.reason
