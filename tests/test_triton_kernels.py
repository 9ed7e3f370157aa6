"""Triton's kernels against float64: interpreted on small shapes; on a GPU, where there is one, on larger ones too."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from slot_slabs import GPT_OSS, SILU, SlotSlab, assert_near, random_slab
from torch import Tensor

from moe_offload.errors import FormatError
from moe_offload.quant import get_format
from moe_offload.quant.activation import FUNCTIONS, GATINGS, Activation
from moe_offload.quant.slot_kernels import SlotKernels, SlotMlp, SlotPart

pytest.importorskip("triton")

import triton
import triton.language as tl
from mended_interpreter import mend_interpreter

from moe_offload.quant.slot_kernels import triton_shapes
from moe_offload.quant.slot_kernels.triton_kernels import TritonKernels

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
FORMATS = ["nf4", "int4", "mxfp4", "nf3", "int8", "fp8", "bf16", "fp16", "fp32"]
BLOCKED_FORMATS = ["bnb-nf4-32", "bnb-fp4-64", "bnb-nf4-128", "fp8-32x32", "fp8-48x96"]
MIXED = ["nf4", "int8", "fp8"]  # gates, ups, down
ACTIVATIONS = [
    *(Activation(function, gating) for function, gating in itertools.product(FUNCTIONS, GATINGS)),
    Activation("sigmoid", gate_limit=1.0, up_limit=1.5),
    Activation("sigmoid", activated_limit=0.7, up_limit=1.5),
    GPT_OSS,
]
on_gpu = pytest.mark.gpu
mend_interpreter()


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=on_gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if request.param == "cuda":
        return torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled here")
    monkeypatch.setattr(triton_shapes, "_ENOUGH_PROGRAMS", 1)  # each takes a while
    return torch.device("cpu")


@pytest.fixture
def kernels(device: torch.device) -> SlotKernels:
    return TritonKernels(device)


def int32(values: list[int] | list[list[int]], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def decoded(kernels: SlotKernels, slab: SlotSlab, slots: list[list[int]], x: Tensor, device: torch.device) -> Tensor:
    outputs = torch.full((len(slots), len(slots[0]), slab.mlp.output_size), math.nan, device=device)
    kernels.decode_experts(slab.mlp, slab.data.to(device), int32(slots, device), x.to(device), outputs)
    return outputs.cpu()


def assert_decodes(kernels: SlotKernels, slab: SlotSlab, slots: list[list[int]], x: Tensor, device: torch.device):
    outputs = decoded(kernels, slab, slots, x, device)
    for row, k in itertools.product(range(len(slots)), range(len(slots[0]))):
        if slots[row][k] >= 0:
            assert_near(outputs[row, k], slab.reference(slots[row][k], x[row]), 1e-5)
        else:
            assert outputs[row, k].isnan().all()


def assert_groups(kernels: SlotKernels, slab: SlotSlab, x: Tensor, device: torch.device, tolerance: float) -> None:
    """Four groups, of which one has no slot and one no rows; rows that share an input, and lie in no order."""
    slots, ends = [2, -1, 0, 1], [0, 3, 5, 5, 8]
    x_rows, out_rows = [0, 4, 1, 2, 3, 3, 0, 2], [8, 0, 1, 2, 3, 4, 5, 6]
    outputs = torch.full((9, slab.mlp.output_size), math.nan, dtype=x.dtype, device=device)
    kernels.grouped_experts(
        slab.mlp,
        slab.data.to(device),
        int32(slots, device),
        int32(ends, device),
        x.to(device),
        int32(x_rows, device),
        outputs,
        int32(out_rows, device),
    )
    outputs = outputs.cpu()
    for slot, begin, end in ((2, 0, 3), (1, 5, 8)):
        assert_near(outputs[out_rows[begin:end]], slab.reference(slot, x[x_rows[begin:end]]), tolerance)
    assert outputs[[2, 3, 7]].isnan().all()


@pytest.mark.parametrize("spec", FORMATS)
def test_few_rows_in_every_format(kernels: SlotKernels, device: torch.device, spec: str) -> None:
    hidden, inner = (70, 3) if spec == "nf3" else (70, 21)  # nf3's eight planes take their time
    slab = random_slab(spec, hidden=hidden, inner=inner, activation=GPT_OSS, bias="bf16")
    assert_decodes(kernels, slab, [[3, 1]], torch.randn(1, hidden).bfloat16(), device)


@pytest.mark.parametrize("spec", BLOCKED_FORMATS)
def test_few_rows_in_formats_of_checkpoints(kernels: SlotKernels, device: torch.device, spec: str) -> None:
    slab = random_slab(spec, hidden=128, inner=128, num_slots=1)
    assert_decodes(kernels, slab, [[0]], torch.randn(1, 128), device)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_every_activation(kernels: SlotKernels, device: torch.device, activation: Activation) -> None:
    slab = random_slab("fp32", hidden=16, inner=8, activation=activation, bias="fp16", num_slots=1)
    assert_decodes(kernels, slab, [[0]], 10 * torch.randn(1, 16), device)


def test_weights_of_several_formats(kernels: SlotKernels, device: torch.device) -> None:
    slab = random_slab(MIXED, hidden=70, inner=20, bias="fp32")
    assert_decodes(kernels, slab, [[1, 3]], torch.randn(1, 70).half(), device)
    assert_groups(kernels, slab, torch.randn(5, 70).half(), device, 5e-3)


def test_what_is_not_a_number_stays_so(kernels: SlotKernels, device: torch.device) -> None:
    slab = random_slab("int8", hidden=32, inner=8, activation=GPT_OSS)
    x = torch.stack([torch.full((32,), math.nan), torch.randn(32)])
    outputs = decoded(kernels, slab, [[0], [0]], x, device)
    assert outputs[0].isnan().all()
    assert outputs[1].isfinite().all()


def test_experts_that_come_one_by_one_sum_to_the_same_bits(kernels: SlotKernels, device: torch.device) -> None:
    slab = random_slab("nf4", hidden=64, inner=16).to(device)
    slots = int32([[3, 0], [1, -1]], device)
    x, weights = torch.randn(2, 64).to(device), torch.rand(2, 2).to(device)
    whole, result = torch.empty(2, 64, device=device), torch.empty(2, 64, device=device)
    for _ in range(2):  # counters are left as they were found
        whole.fill_(math.nan)
        kernels.decode_layer(slab.mlp, slab.data, slots, x, weights, whole)
        assert whole.isfinite().all()
    outputs = torch.full((2, 2, 64), math.nan, device=device)
    for arrived in ([[-1, 0], [-1, -1]], [[3, -1], [1, -1]]):
        kernels.decode_experts(slab.mlp, slab.data, int32(arrived, device), x, outputs)
    kernels.combine(outputs, slots, weights, result)
    assert torch.equal(result, whole)
    expected = [sum(weights[r, k] * outputs[r, k] for k in range(2) if slots[r, k] >= 0) for r in range(2)]
    assert_near(whole, torch.stack(expected), 1e-6)


@pytest.mark.parametrize("spec", ["nf4", "bf16"])
def test_bits_do_not_depend_on_slots_nor_on_other_rows(kernels: SlotKernels, device: torch.device, spec: str) -> None:
    slab = random_slab(spec, hidden=64, inner=16, num_slots=3)
    slab.data[2] = slab.data[0]
    x = torch.randn(2, 64)
    outputs = decoded(kernels, slab, [[0, 1], [2, 2]], x[[0, 0]], device)
    assert torch.equal(outputs[0, 0], outputs[1, 0])
    assert torch.equal(outputs[1, 0], outputs[1, 1])
    assert torch.equal(decoded(kernels, slab, [[1], [2]], x[[1, 0]], device)[1, 0], outputs[0, 0])


def test_slabs_beyond_two_gigabytes(kernels: SlotKernels, device: torch.device) -> None:
    slab = random_slab("int8", hidden=64, inner=16, num_slots=1)
    large = torch.empty(3, 1200 << 20, dtype=torch.uint8, device=device)  # only what is written takes memory
    large[2, : slab.data.shape[1]] = slab.data[0]
    x, outputs = torch.randn(1, 64), torch.full((1, 1, 64), math.nan, device=device)
    kernels.decode_experts(slab.mlp, large, int32([[2]], device), x.to(device), outputs)
    assert_near(outputs[0, 0].cpu(), slab.reference(0, x[0]), 1e-5)


@triton.jit
def _product_in_bf16(a, b, product, rounded):
    index = tl.arange(0, 16)
    place = index[:, None] * 16 + index[None, :]
    total = tl.dot(tl.load(a + place), tl.trans(tl.load(b + place)), tl.zeros([16, 16], dtype=tl.float32))
    tl.store(product + place, total)
    tl.store(rounded + place, total.to(tl.bfloat16))


def test_matrices_of_bf16_are_multiplied_as_numbers(device: torch.device) -> None:
    a, b = (torch.randn(16, 16, device=device).bfloat16() for _ in range(2))
    a[0, 0], a[1, 0] = math.inf, math.nan
    product, rounded = torch.empty(16, 16, device=device), torch.empty_like(a)
    _product_in_bf16[(1,)](a, b, product, rounded)
    torch.testing.assert_close(product, a.float() @ b.float().T, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(rounded, product.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 1.5e-2)], ids=str)
@pytest.mark.parametrize("spec", FORMATS)
def test_many_rows_in_every_format(
    kernels: SlotKernels, device: torch.device, spec: str, dtype: torch.dtype, tolerance: float
) -> None:
    slab = random_slab(spec, hidden=70, inner=21, activation=GPT_OSS, bias="bf16")
    assert_groups(kernels, slab, torch.randn(5, 70).to(dtype), device, tolerance)


@pytest.mark.parametrize("spec", BLOCKED_FORMATS)
def test_many_rows_in_formats_of_checkpoints(kernels: SlotKernels, device: torch.device, spec: str) -> None:
    slab = random_slab(spec, hidden=128, inner=128, num_slots=3)
    assert_groups(kernels, slab, torch.randn(5, 128).bfloat16(), device, 1.5e-2)


@pytest.mark.parametrize(
    ("spec", "activation"),
    [("int4", SILU), ("int8", SILU), ("fp8", Activation("relu", "none")), ("fp8-48x96", SILU), ("bf16", SILU)],
)
def test_many_rows_in_fp32(kernels: SlotKernels, device: torch.device, spec: str, activation: Activation) -> None:
    slab = random_slab(spec, hidden=100, inner=40, activation=activation)
    assert_groups(kernels, slab, torch.randn(5, 100), device, 1e-5)


def test_fp8_on_devices_that_convert_it(device: torch.device) -> None:
    """All numbers of it, beside the way that takes them apart by their bits."""
    slab = random_slab("fp8", hidden=256, inner=8, num_slots=1)
    codes = torch.arange(256, dtype=torch.uint8)
    slab.mlp.up[0].packed(slab.data[0])[: 16 * 256].view(16, 256)[:] = codes.where(codes & 0x7F != 0x7F, 0)
    x, outputs = torch.randn(1, 256) / 100, []
    for capability in ((8, 0), (8, 9)):
        if device.type == "cuda" and torch.cuda.get_device_capability() < capability:
            pytest.skip("is no such device")
        kernels = TritonKernels(device)
        kernels._capability = capability
        outputs.append(decoded(kernels, slab, [[0]], x, device))
        assert_near(outputs[-1][0, 0], slab.reference(0, x[0]), 1e-5)
    assert torch.equal(*outputs)


def test_fp8_has_what_is_not_a_number(kernels: SlotKernels, device: torch.device) -> None:
    slab = random_slab("fp8", hidden=32, inner=8, num_slots=1)
    slab.data[0, 5] = 0x7F
    assert decoded(kernels, slab, [[0]], torch.randn(1, 32), device).isnan().all()


def test_rows_that_begin_anywhere(kernels: SlotKernels, device: torch.device) -> None:
    slab = random_slab("nf4", hidden=72, inner=16)
    x = torch.randn(3, 72, device=device)
    odd = torch.empty(3 * 72 + 1, device=device)[1:].view(3, 72).copy_(x)
    assert odd.data_ptr() % 16
    assert torch.equal(*(decoded(kernels, slab, [[0], [1], [2]], rows, device) for rows in (x, odd)))


def test_many_rows_in_bf16_on_devices_without_it(device: torch.device) -> None:
    kernels = TritonKernels(device)
    kernels._capability = (7, 5)
    slab = random_slab("nf4", hidden=64, inner=32)
    assert_groups(kernels, slab, torch.randn(5, 64).bfloat16(), device, 1e-2)


def test_weights_that_kernels_cannot_read_are_told_apart() -> None:
    TritonKernels.check(random_slab("nf4", num_pieces=2).mlp)
    with pytest.raises(FormatError, match="multiple of 16"):
        TritonKernels.check(random_slab("fp8-8x8").mlp)
    large = SlotPart(get_format("bf16"), (1 << 20, 1024), 0)
    with pytest.raises(FormatError, match="takes 2147483648"):
        TritonKernels.check(SlotMlp((large,), SlotPart(get_format("bf16"), (1024, 1 << 19), 0), SILU))
    mlp = random_slab("bf16", num_pieces=4).mlp
    with pytest.raises(FormatError, match="split in 4"):
        TritonKernels.check(mlp)
    with pytest.raises(FormatError, match="split in 2"):
        TritonKernels.check(SlotMlp(random_slab("bf16", num_pieces=2, activation=GPT_OSS).mlp.up, mlp.down, GPT_OSS))


def test_kernels_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    """Down to machine code, without a device: what the interpreter lets pass, and whether it fits."""
    script = Path(__file__).with_name("triton_compilation.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = str(Path(__file__).parents[1] / "benchmarks")
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ok") == 7


@on_gpu
@pytest.mark.parametrize("spec", FORMATS)
@pytest.mark.parametrize(("hidden", "inner"), [(2048, 768), (1024, 3584)])
def test_shapes_of_models(spec: str, hidden: int, inner: int) -> None:
    device = torch.device("cuda")
    kernels, slab = TritonKernels(device), random_slab(spec, hidden=hidden, inner=inner)
    assert_decodes(kernels, slab, [[0, 3], [2, -1]], torch.randn(2, hidden).bfloat16(), device)
    for num_tokens, dtype in ((16, torch.bfloat16), (256, torch.float16), (1024, torch.bfloat16)):
        assert_groups(kernels, slab, torch.randn(num_tokens, hidden).to(dtype), device, 2e-2)


@on_gpu
def test_a_layer_can_be_captured_in_a_graph() -> None:
    device = torch.device("cuda")
    kernels, slab = TritonKernels(device), random_slab("nf4", hidden=512, inner=256).to(device)
    slots, x = int32([[3, 0]], device), torch.randn(1, 512, device=device)
    weights, result = torch.rand(1, 2, device=device), torch.empty(1, 512, device=device)
    kernels.decode_layer(slab.mlp, slab.data, slots, x, weights, result)
    eager = result.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.decode_layer(slab.mlp, slab.data, slots, x, weights, result)
    for _ in range(3):
        result.zero_()
        graph.replay()
        assert torch.equal(result, eager)
    slots.copy_(int32([[1, 2]], device))
    graph.replay()
    kernels.decode_layer(slab.mlp, slab.data, slots, x, weights, eager)
    assert torch.equal(result, eager)
