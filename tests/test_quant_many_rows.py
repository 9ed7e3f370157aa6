"""Products of many rows in bf16, against exact sums over the same bf16 weights; test_quant_contract.py has the rest."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moe_offload.quant import get_format, kernels
from moe_offload.quant.activation import Activation
from moe_offload.quant.moe_layer import PackedMlp

SPECS = ("nf4", "nf3", "mxfp4", "int8", "fp8-48x40")
# around what is computed at once: 16 and 64 rows of x, 256 of them a pass; 48 and 384 rows, 256 columns of the weight
SHAPES = ((1, 1), (7, 640), (48, 256), (97, 513), (400, 260))
ROWS = (1, 15, 17, 64, 65, 112, 257)

pytestmark = pytest.mark.skipif(
    not kernels.multiplies_many(torch.empty(0)), reason="this machine multiplies many rows through torch"
)


def weight_of(spec: str, shape: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return get_format(spec).quantize(torch.randn(shape, generator=generator))


def activations(num_rows: int, num_cols: int) -> torch.Tensor:
    return torch.randn((num_rows, num_cols), generator=torch.Generator().manual_seed(num_rows)).to(torch.bfloat16)


def product(x: torch.Tensor, spec: str, packed: torch.Tensor, shape: tuple[int, int], dtype=torch.float32):
    fmt = get_format(spec)
    out = torch.full((x.shape[0], shape[0]), float("nan"), dtype=dtype)
    kernels.linear_many(x, packed, fmt.layout(shape), fmt.code, out)
    return out


@pytest.mark.parametrize("spec", SPECS)
def test_sums_are_exact_but_for_fp32(spec):
    for shape in SHAPES:
        packed = weight_of(spec, shape)
        weight = get_format(spec).dequantize(packed, shape, torch.bfloat16).double()
        for num_rows in ROWS:
            x = activations(num_rows, shape[1])
            exact = x.double() @ weight.T
            error = (product(x, spec, packed, shape).double() - exact).abs()
            allowed = 1e-6 * (x.double().abs() @ weight.abs().T)
            assert bool((error <= allowed).all()), (shape, num_rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_once(dtype):
    packed, x = weight_of("nf4", (97, 513)), activations(65, 513)
    assert torch.equal(product(x, "nf4", packed, (97, 513), dtype), product(x, "nf4", packed, (97, 513)).to(dtype))


@pytest.mark.parametrize("spec", SPECS)
def test_a_row_does_not_depend_on_what_is_computed_beside_it(spec):
    shape = (301, 700)
    packed, x = weight_of(spec, shape), activations(300, 700)
    expected = product(x, spec, packed, shape)
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            assert torch.equal(product(x, spec, packed, shape), expected)
    finally:
        torch.set_num_threads(threads)
    for rows in (slice(0, 1), slice(63, 80), slice(150, 299)):
        assert torch.equal(product(x[rows], spec, packed, shape), expected[rows])


def test_strides_do_not_matter():
    shape = (100, 300)
    packed, x = weight_of("nf4", shape), activations(70, 300)
    expected = product(x, "nf4", packed, shape)
    wide = torch.zeros(70, 400, dtype=torch.bfloat16)
    wide[:, :300] = x
    assert torch.equal(product(wide[:, :300], "nf4", packed, shape), expected)
    assert torch.equal(product(x.T.contiguous().T, "nf4", packed, shape), expected)


def test_no_columns_sum_to_zero():
    fmt = get_format("nf4")
    packed = fmt.quantize(torch.empty(5, 0))
    assert torch.equal(product(activations(70, 0), "nf4", packed, (5, 0)), torch.zeros(70, 5))


def test_many_rows_take_this_way():
    """What is tested here is what `Format.linear` does."""
    shape = (60, 256)
    packed, x = weight_of("int4", shape), activations(64, 256)
    assert torch.equal(get_format("int4").linear(x, packed, shape, torch.float32), product(x, "int4", packed, shape))


class Expert:
    """Random weights of one expert, packed, and its description."""

    hidden, inner = 200, 210  # no multiples of anything that is computed at once, and more gates than that

    def __init__(self, spec: str, activation: Activation, *, has_bias: bool, num_pieces: int) -> None:
        self.activation, fmt = activation, get_format(spec)
        rows = self.inner if activation.gating == "none" else 2 * self.inner
        shape = (rows // num_pieces, self.hidden)
        self.up = [(fmt, shape, fmt.quantize(torch.randn(shape) * 0.1)) for _ in range(num_pieces)]
        shape = (self.hidden, self.inner)
        self.down = (fmt, shape, fmt.quantize(torch.randn(shape) * 0.1))
        self.biases = (torch.randn(rows).bfloat16(), torch.randn(self.hidden).bfloat16()) if has_bias else (None, None)
        assert PackedMlp.supported(activation, self.up, [self.down], *self.biases)
        self.mlp = PackedMlp(self.up, self.down, *self.biases)

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        """In float64, from weights in bf16, with the activations rounded to bf16."""
        up_bias, down_bias = (0.0 if bias is None else bias.double() for bias in self.biases)
        up = torch.cat([fmt.dequantize(packed, shape, torch.bfloat16) for fmt, shape, packed in self.up]).double()
        fmt, shape, packed = self.down
        hidden = self.activation(x.double() @ up.T + up_bias).to(torch.bfloat16).double()
        return hidden @ fmt.dequantize(packed, shape, torch.bfloat16).double().T + down_bias


@pytest.mark.parametrize(
    ("spec", "activation", "has_bias", "num_pieces"),
    [
        ("nf4", Activation("sigmoid"), False, 1),
        ("int4", Activation("sigmoid"), True, 2),
        ("nf4", Activation("gelu_tanh"), True, 1),
        ("bf16", Activation("sigmoid"), True, 2),
        ("mxfp4", Activation("sigmoid", "interleaved", 1.702, gate_limit=1.0, up_limit=1.0, up_shift=1.0), True, 1),
        ("int8", Activation("relu", "none"), True, 1),
        ("fp8", Activation("gelu", "none"), False, 1),
        ("int8", Activation("sigmoid", "interleaved"), False, 2),
    ],
)
def test_an_experts_rows_are_those_of_its_mlp(spec, activation, has_bias, num_pieces):
    expert = Expert(spec, activation, has_bias=has_bias, num_pieces=num_pieces)
    x = torch.randn(400, expert.hidden).bfloat16()
    for num_rows in (9, 64, 300):
        x_rows, out_rows = torch.randperm(400)[:num_rows], torch.randperm(500)[:num_rows]
        out = torch.zeros(500, expert.hidden)
        expert.mlp.compute_rows(activation, x, x_rows, out, out_rows)
        exact = expert.reference(x[x_rows])
        # a sum in fp32 may fall on the other side of a rounding of an activation to bf16
        assert bool(((out[out_rows] - exact).abs() <= 2e-3 * exact.abs().max()).all()), num_rows
        out[out_rows] = 0
        assert not out.any(), "only the rows asked for are written"


def test_an_experts_rows_do_not_depend_on_one_another():
    expert = Expert("nf4", Activation("sigmoid"), has_bias=True, num_pieces=1)
    x = torch.randn(300, expert.hidden).bfloat16()
    rows = torch.arange(300)
    expected = torch.empty(300, expert.hidden, dtype=torch.bfloat16)
    expert.mlp.compute_rows(expert.activation, x, rows, expected, rows)
    for some in (rows[5:6], rows[100:117].flip(0), rows[::3]):
        out = torch.empty_like(expected)
        expert.mlp.compute_rows(expert.activation, x, some, out, some)
        assert torch.equal(out[some], expected[some])


@pytest.mark.parametrize(("spec", "takes"), [("nf4", True), ("nf3", True), ("int8", True), ("bf16", False)])
def test_which_experts_take_their_rows_at_once(spec, takes):
    expert = Expert(spec, Activation("sigmoid"), has_bias=False, num_pieces=1)
    x = torch.zeros(400, expert.hidden, dtype=torch.bfloat16)
    assert expert.mlp.takes_rows(x, 400) is takes
    assert not expert.mlp.takes_rows(x, 2)
    assert not expert.mlp.takes_rows(x.float(), 400)


def test_without_columns_a_product_is_zero_on_a_thread_that_has_multiplied_nothing_yet():
    packed, x = weight_of("nf4", (5, 0)), activations(30, 0)
    with ThreadPoolExecutor(max_workers=1) as fresh:
        assert fresh.submit(product, x, "nf4", packed, (5, 0)).result().eq(0).all()
