"""One contract for every format, on every backend that this machine has."""

from itertools import product

import pytest
import torch

from moe_offload.errors import FormatError
from moe_offload.quant import Format, format_names, get_format, kernels, reference

CODED = ("int8", "nf4", "int4", "mxfp4", "nf3", "fp8", "fp8-16x24", "bnb-nf4-64", "bnb-fp4-32", "bnb-nf4-256")
RAW = ("bf16", "fp16", "fp32")
HALF_SCALED = ("int8", "nf4", "int4", "nf3")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (3, 64), (5, 100), (33, 192), (130, 288), (7, 31), (0, 64), (4, 0), (257, 129))
MANY_ROWS = 70


@pytest.fixture(params=kernels.available())
def backend(request):
    with kernels.forced(request.param):
        yield request.param


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shapes_of(fmt: Format):
    """The odd shapes that a format can hold, or else multiples of its block."""
    if not fmt.spec.startswith("bnb"):
        return SHAPES
    block = int(fmt.spec.rsplit("-", 1)[1])
    return ((1, block), (5, 3 * block), (0, block), (34, block))


def block_max(fmt: Format, weight: torch.Tensor) -> torch.Tensor:
    """The largest magnitude in each weight's block."""
    if fmt.is_raw or weight.numel() == 0:
        return weight.abs()
    layout = fmt.layout(tuple(weight.shape))
    result = torch.empty_like(weight)
    for i in range(0, weight.shape[0], layout.block_rows):
        for j in range(0, weight.shape[1], layout.block_cols):
            at = (slice(i, i + layout.block_rows), slice(j, j + layout.block_cols))
            result[at] = weight[at].abs().max()
    return result


def assert_within_bound(fmt: Format, weight: torch.Tensor, packed: torch.Tensor) -> None:
    values = fmt.dequantize(packed, tuple(weight.shape), torch.float32).double()
    weight = weight.double()  # so that the bound itself is not rounded
    error, bound = (values - weight).abs(), fmt.error_bound
    allowed = bound.of_block_max * block_max(fmt, weight) + bound.of_weight * weight.abs() + bound.absolute
    assert bool((error <= allowed * (1 + 1e-5)).all()), f"{(error - allowed).max()} beyond the bound"


@pytest.mark.parametrize("spec", CODED + RAW)
def test_roundtrip_is_within_the_bound(spec, backend):
    fmt = get_format(spec)
    for shape, dtype in product(shapes_of(fmt), DTYPES):
        weight = random(*shape).to(dtype)
        packed = fmt.quantize(weight)
        assert packed.dtype == torch.uint8
        assert packed.shape == (fmt.nbytes(shape),)
        assert packed.numel() % 64 == 0
        assert_within_bound(fmt, weight, packed)


@pytest.mark.parametrize("spec", CODED)
def test_every_backend_packs_the_same_bytes(spec, backend):
    fmt = get_format(spec)
    for shape in shapes_of(fmt):
        weight = random(*shape) * torch.logspace(-4, 3, shape[1]) if shape[1] else random(*shape)
        weight = weight.to(torch.bfloat16)  # of few digits, so that ties occur
        packed = fmt.quantize(weight)
        with kernels.forced("torch"):
            assert torch.equal(packed, fmt.quantize(weight))


@pytest.mark.parametrize("spec", CODED)
def test_every_backend_dequantises_to_the_same_values(spec, backend):
    fmt = get_format(spec)
    for shape, dtype in product(shapes_of(fmt), DTYPES):
        packed = fmt.quantize(random(*shape))
        values = fmt.dequantize(packed, shape, dtype)
        assert values.shape == shape
        assert values.dtype == dtype
        with kernels.forced("torch"):
            assert torch.equal(values, fmt.dequantize(packed, shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", CODED + RAW)
def test_linear_equals_the_reference(spec, dtype, backend):
    fmt = get_format(spec)
    for shape in shapes_of(fmt):
        weight = random(*shape)
        packed = fmt.quantize(weight)
        values = fmt.dequantize(packed, shape, torch.float32)
        for num_tokens in (0, 1, 3, 16, MANY_ROWS):
            x = random(num_tokens, shape[1], seed=1).to(dtype)
            out = fmt.linear(x, packed, shape)
            assert out.shape == (num_tokens, shape[0])
            assert out.dtype == dtype
            exact = reference.linear(x.double(), values.double(), torch.float64)
            # rounding of the result, of weights to bf16 where matrix units are used, and of sums in fp32
            eps = torch.finfo(dtype).eps
            allowed = eps * exact.abs() + (x.double().abs() @ values.double().abs().T) * (1e-5 + eps / 2)
            assert bool(((out.double() - exact).abs() <= allowed + 1e-7).all()), (shape, num_tokens)


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("spec", ["nf4", "fp8", "int8", "bf16"])
def test_linear_rounds_once_to_the_dtype_asked_for(spec, out_dtype, backend):
    fmt = get_format(spec)
    packed = fmt.quantize(random(9, 128))
    for num_tokens in (1, 5, MANY_ROWS):
        x = random(num_tokens, 128, seed=1)
        out = fmt.linear(x, packed, (9, 128), out_dtype)
        assert out.dtype == out_dtype
        assert torch.equal(out, fmt.linear(x, packed, (9, 128), torch.float32).to(out_dtype))


@pytest.mark.parametrize("spec", CODED + RAW)
def test_same_bits_wherever_the_bytes_lie(spec, backend):
    fmt = get_format(spec)
    shape = shapes_of(fmt)[1]
    packed = fmt.quantize(random(*shape))
    for num_tokens in (1, 5, MANY_ROWS):
        x = random(num_tokens, shape[1], seed=1).to(torch.bfloat16)
        expected = fmt.linear(x, packed, shape)
        slab = torch.full((packed.numel() + 4096,), 0xAB, dtype=torch.uint8)
        start = -slab.data_ptr() % 64
        for offset in (0, 64, 192, 1024):
            slot = slab[start + offset : start + offset + packed.numel()]
            slot.copy_(packed)
            assert torch.equal(fmt.linear(x, slot, shape), expected)
            assert torch.equal(fmt.dequantize(slot, shape, torch.float32), fmt.dequantize(packed, shape, torch.float32))


@pytest.mark.parametrize("spec", CODED)
@pytest.mark.parametrize(("num_rows", "num_cols"), [(301, 1152), (15, 2304)])
def test_rows_do_not_depend_on_what_is_computed_beside_them(spec, backend, num_rows, num_cols):
    """Neither on the number of threads, nor on the other tokens of a small batch."""
    fmt = get_format(spec)
    block = fmt.layout((0, 4096)).block_cols
    shape = (num_rows, num_cols // block * block or num_cols)
    packed = fmt.quantize(random(*shape))
    x = random(7, shape[1], seed=1).to(torch.bfloat16)
    expected = fmt.linear(x, packed, shape)
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            assert torch.equal(fmt.linear(x, packed, shape), expected)
    finally:
        torch.set_num_threads(threads)
    if backend != "torch":
        for token in range(7):
            assert torch.equal(fmt.linear(x[token : token + 1], packed, shape)[0], expected[token])


@pytest.mark.parametrize("spec", ["bf16", "fp16"])
def test_few_rows_of_raw_weights_do_not_depend_on_what_is_computed_beside_them(spec, backend):
    if backend == "torch":
        pytest.skip("torch picks its product by the number of rows")
    fmt = get_format(spec)
    for shape in ((301, 1152), (5, 100), (9, 31)):
        packed = fmt.quantize(random(*shape))
        x = random(4, shape[1], seed=1).to(torch.bfloat16)
        expected = fmt.linear(x, packed, shape)
        for token in range(4):
            assert torch.equal(fmt.linear(x[token : token + 1], packed, shape)[0], expected[token])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", ["int8", "nf4", "int4", "mxfp4", "bnb-fp4-32"])
def test_activations_are_held_to_a_fraction_of_their_groups_largest(spec, dtype, backend):
    """Within a group of columns, to 2^-15 of its largest; an outlier costs its own group alone."""
    if backend == "torch":
        pytest.skip("plain torch rounds weights to bf16 instead")
    fmt = get_format(spec)
    shape = (33, 384)
    values = fmt.dequantize(packed := fmt.quantize(random(*shape)), shape, torch.float32).double()
    x = random(5, 384, seed=1) * torch.logspace(-4, 0, 384)[torch.randperm(384)]
    x[:, 70] = 3e4
    x = x.to(dtype)
    error = (fmt.linear(x, packed, shape, torch.float32).double() - x.double() @ values.T).abs()
    groups = torch.unflatten(x.double().abs(), 1, (-1, 64)).amax(dim=-1)  # [T, K/64]
    weights = torch.unflatten(values.abs(), 1, (-1, 64)).sum(dim=-1)  # [N, K/64]
    # nf4's sixteen numbers are integers too: 4e-5 of the largest at most, so of any 1/0.4 of that
    table = 4e-5 * 2.5 if "nf4" in spec else 0.0
    allowed = (groups @ weights.T) * 2**-15 + (x.double().abs() @ values.abs().T) * (1e-6 + table)
    assert bool((error <= allowed).all())
    # where activations lie within 1/16 of each other, and weights are integers, nothing is lost but fp32's sums
    x = (random(5, 384, seed=2).abs() + 0.3).clamp(max=4).to(dtype)
    error = (fmt.linear(x, packed, shape, torch.float32).double() - x.double() @ values.T).abs()
    assert bool((error <= (x.double() @ values.abs().T) * (1e-6 + table)).all())


@pytest.mark.parametrize("spec", CODED)
def test_activations_that_are_not_finite_show(spec, backend):
    fmt = get_format(spec)
    shape = shapes_of(fmt)[1]
    packed = fmt.quantize(random(*shape))
    for bad, dtype in product((float("nan"), float("inf"), float("-inf")), DTYPES):
        x = random(3, shape[1], seed=1).to(dtype)
        x[1, shape[1] // 2] = bad
        out = fmt.linear(x, packed, shape)
        assert not bool(out[1].isfinite().any())
        assert bool(out[0].isfinite().all())


@pytest.mark.parametrize("spec", CODED)
def test_tiny_and_large_activations(spec, backend):
    fmt = get_format(spec)
    shape = shapes_of(fmt)[1]
    packed = fmt.quantize(random(*shape))
    values = fmt.dequantize(packed, shape, torch.float32).double()
    for magnitude in (1e-40, 1e-30, 1e-10, 1e10, 1e30):
        x = (random(3, shape[1], seed=1) * magnitude).to(torch.bfloat16)
        out = fmt.linear(x, packed, shape, torch.float32).double()
        allowed = 5e-3 * (x.double().abs() @ values.abs().T) + 2**-115 * values.abs().sum(dim=1)
        assert bool(((out - x.double() @ values.T).abs() <= allowed).all()), magnitude


@pytest.mark.parametrize("spec", CODED)
def test_zeros_stay_zeros(spec, backend):
    fmt = get_format(spec)
    shape = shapes_of(fmt)[1]
    weight = random(*shape)
    layout = fmt.layout(shape)
    weight[:, : layout.block_cols] = 0
    packed = fmt.quantize(weight)
    assert bool((fmt.dequantize(packed, shape, torch.float32)[:, : layout.block_cols] == 0).all())
    zeros = fmt.quantize(torch.zeros(shape))
    assert bool((fmt.dequantize(zeros, shape, torch.bfloat16) == 0).all())
    assert bool((fmt.linear(random(3, shape[1]), zeros, shape) == 0).all())


@pytest.mark.parametrize("spec", [*CODED, "bf16", "fp32"])
def test_tiny_and_large_weights_are_within_the_bound(spec, backend):
    fmt = get_format(spec)
    shape = shapes_of(fmt)[1]
    for magnitude in (1e-45, 1e-38, 1e-30, 1e-8, 2e-6, 6e4):
        weight = random(*shape).clamp(-1, 1) * magnitude
        packed = fmt.quantize(weight)
        assert_within_bound(fmt, weight, packed)
        with kernels.forced("torch"):
            assert torch.equal(packed, fmt.quantize(weight)), magnitude


@pytest.mark.parametrize("spec", CODED)
def test_the_largest_weights(spec, backend):
    fmt = get_format(spec)
    shape = shapes_of(fmt)[1]
    weight = random(*shape).clamp(-1, 1) * 3e38
    if spec in HALF_SCALED:
        with pytest.raises(FormatError, match=r"\(65504\); keep this weight in bf16"):
            fmt.quantize(weight)
    else:
        packed = fmt.quantize(weight)
        assert_within_bound(fmt, weight, packed)


@pytest.mark.parametrize("spec", CODED + RAW)
def test_nan_and_infinity_are_refused(spec, backend):
    fmt = get_format(spec)
    shape = shapes_of(fmt)[1]
    for dtype in DTYPES:
        for bad in (float("nan"), float("inf"), float("-inf")):
            weight = random(*shape).to(dtype)
            weight[-1, -1] = bad
            with pytest.raises(FormatError, match="NaN or infinity"):
                fmt.quantize(weight)


@pytest.mark.parametrize("spec", CODED)
def test_strided_weights_and_inputs(spec, backend):
    fmt = get_format(spec)
    shape = shapes_of(fmt)[1]
    wide = random(shape[0], 2 * shape[1] + 3)
    packed = fmt.quantize(wide[:, 3 : 3 + shape[1]].contiguous())
    assert torch.equal(fmt.quantize(wide[:, 3 : 3 + shape[1]]), packed)
    assert torch.equal(fmt.quantize(wide[:, 3 : 3 + shape[1]].T.contiguous().T), packed)
    x = random(shape[1], 4).T
    assert torch.equal(fmt.linear(x, packed, shape), fmt.linear(x.contiguous(), packed, shape))


@pytest.mark.parametrize("spec", CODED + RAW)
def test_wrong_sizes_are_refused(spec):
    fmt = get_format(spec)
    shape = shapes_of(fmt)[1]
    packed = fmt.quantize(random(*shape))
    for wrong in (packed[:-64], packed.view(torch.int8)):
        with pytest.raises(FormatError, match=f"{packed.numel()} bytes of uint8"):
            fmt.dequantize(wrong, shape, torch.float32)
        with pytest.raises(FormatError, match=f"{packed.numel()} bytes of uint8"):
            fmt.linear(random(1, shape[1]), wrong, shape)
    with pytest.raises(FormatError, match=r"x must be \[T, "):
        fmt.linear(random(1, shape[1] + 1), packed, shape)
    if not fmt.is_raw:
        with pytest.raises(FormatError, match=r"\[N, K\] matrices"):
            fmt.quantize(random(shape[1]))
        with pytest.raises(FormatError, match="float64"):
            fmt.quantize(random(*shape).double())


@pytest.mark.parametrize("spec", CODED + RAW)
def test_bits_per_weight_is_what_a_large_matrix_takes(spec):
    fmt = get_format(spec)
    shape = (8 * 3 * 16 * 128, 4096 * 3)
    assert fmt.nbytes(shape) * 8 / (shape[0] * shape[1]) == pytest.approx(fmt.bits_per_weight(), rel=1e-3)


@pytest.mark.parametrize(
    ("spec", "shape", "expected"),
    [
        ("nf4", (3, 100), 3 * 64 + 64),
        ("int4", (2, 64), 64 + 64),
        ("int8", (3, 100), 3 * 128 + 64),
        ("mxfp4", (4, 96), 192 + 64),
        ("nf3", (3, 100), 192 + 64),
        ("fp8", (130, 300), 39040 + 64),
        ("bf16", (5,), 64),
        ("fp32", (5, 7, 2), 320),
        ("bnb-nf4-64", (2, 128), 128 + 64),
    ],
)
def test_exact_sizes(spec, shape, expected):
    assert get_format(spec).nbytes(shape) == expected


def test_names():
    assert format_names() == ("bf16", "int8", "nf4", "int4", "mxfp4", "nf3", "fp8")
    for spec in CODED + RAW:
        assert get_format(spec).spec == spec
        assert get_format(get_format(spec).spec) == get_format(spec)
    assert get_format("fp8-128x128") == get_format("fp8")
    for wrong in ("q4", "fp8-0x4", "fp8-4x", "bnb-nf4-63", "bnb-int8-64", "nf4 ", ""):
        with pytest.raises(FormatError):
            get_format(wrong)
    with pytest.raises(FormatError, match="known: bf16, int8, nf4, int4, mxfp4, nf3, fp8, fp16, fp32, fp8-ROWSxCOLS"):
        get_format("q4")


def test_raw_weights_are_views():
    weight = random(6, 8).to(torch.bfloat16)
    packed = get_format("bf16").quantize(weight)
    view = get_format("bf16").dequantize(packed, (6, 8), torch.bfloat16)
    assert view.data_ptr() == packed.data_ptr()
    assert torch.equal(view, weight)
    with pytest.raises(FormatError, match="largest number"):
        get_format("fp16").quantize(random(6, 8) * 1e6)
