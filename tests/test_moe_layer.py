"""All experts of a token in one call, against the same experts one by one in plain torch."""

import itertools
import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from moe_offload.quant import get_format, kernels
from moe_offload.quant.activation import FUNCTIONS, GATINGS, Activation
from moe_offload.quant.moe_layer import MoeStep, PackedMlp

NUM_EXPERTS, HIDDEN, INNER = 5, 192, 128
BACKENDS = [name for name in kernels.available() if name != "torch"]
FORMATS = ("nf4", "int4", "mxfp4", "nf3", "int8", "fp8", "bf16", "fp16")
GPT_OSS = Activation("sigmoid", "interleaved", 1.702, gate_limit=7.0, up_limit=7.0, up_shift=1.0)
ACTIVATIONS = [
    *(Activation(function, gating) for function, gating in itertools.product(FUNCTIONS, GATINGS)),
    Activation("sigmoid", alpha=1.702),
    Activation("sigmoid", gate_limit=1.0, up_limit=1.5),
    Activation("sigmoid", activated_limit=0.7, up_limit=1.5),
    GPT_OSS,
]

pytestmark = pytest.mark.skipif(not BACKENDS, reason="no kernels were built")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.forced(request.param):
        yield request.param


class Expert:
    """Random weights of one expert, packed, and its description."""

    def __init__(self, spec: str, activation: Activation, *, has_bias: bool = False, num_pieces: int = 1) -> None:
        self.activation, fmt = activation, get_format(spec)
        rows = INNER if activation.gating == "none" else 2 * INNER
        self.shapes = [(rows // num_pieces, HIDDEN)] * num_pieces
        self.up = [(fmt, shape, fmt.quantize(torch.randn(shape) * 0.1)) for shape in self.shapes]
        self.down = (fmt, (HIDDEN, INNER), fmt.quantize(torch.randn(HIDDEN, INNER) * 0.1))
        self.biases = (torch.randn(rows).bfloat16(), torch.randn(HIDDEN).bfloat16()) if has_bias else (None, None)
        assert PackedMlp.supported(activation, self.up, [self.down], *self.biases)
        self.mlp = PackedMlp(self.up, self.down, *self.biases)

    def reference(self, x: Tensor) -> Tensor:
        """In float64, from the dequantised weights."""
        up_bias, down_bias = (0.0 if bias is None else bias.double() for bias in self.biases)
        up = torch.cat([fmt.dequantize(packed, shape, torch.float32) for fmt, shape, packed in self.up]).double()
        fmt, shape, packed = self.down
        hidden = self.activation(x.double() @ up.T + up_bias)
        return hidden @ fmt.dequantize(packed, shape, torch.float32).double().T + down_bias


def routed(experts: Sequence[Expert], x: Tensor, order: Sequence[int], weights: Sequence[float], *calls: list[int]):
    """The step in the given calls, or in one."""
    step = MoeStep(experts[0].activation, x, order, weights)
    for call in calls or [list(step.row_of)]:
        step.compute([(expert_idx, experts[expert_idx].mlp) for expert_idx in call])
    return step.result


def assert_near(result: Tensor, experts: Sequence[Expert], order: Sequence[int], weights: Sequence[float], x: Tensor):
    expected = sum(weight * experts[e].reference(x) for e, weight in zip(order, weights, strict=True))
    error = (result.double() - expected).abs().max() / expected.abs().max()
    assert error < (4e-3 if result.dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_every_activation(backend: str, activation: Activation) -> None:
    torch.manual_seed(0)
    experts = [Expert("int8", activation, has_bias=True) for _ in range(3)]
    x = torch.randn(1, HIDDEN)
    assert_near(routed(experts, x, [2, 0], [0.75, 0.5]), experts, [2, 0], [0.75, 0.5], x)


@pytest.mark.parametrize("spec", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_format(backend: str, spec: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    experts = [Expert(spec, Activation("sigmoid"), num_pieces=2) for _ in range(NUM_EXPERTS)]
    x = torch.randn(1, HIDDEN).to(dtype)
    order, weights = [3, 1, 4], [0.5, 0.3, 0.2]
    result = routed(experts, x, order, weights)
    assert result.dtype == dtype
    assert result.shape == x.shape
    assert_near(result, experts, order, weights, x)


def test_experts_of_several_formats_in_one_call(backend: str) -> None:
    torch.manual_seed(0)
    experts = [Expert(spec, GPT_OSS) for spec in FORMATS]
    x = torch.randn(1, HIDDEN).bfloat16()
    order, weights = [3, 1, 4, 0, 2], [0.5, 0.3, 0.2, 0.1, 0.1]
    assert_near(routed(experts, x, order, weights), experts, order, weights, x)


@pytest.mark.parametrize("spec", FORMATS)
def test_bits_do_not_depend_on_which_experts_come_together(backend: str, spec: str) -> None:
    torch.manual_seed(0)
    experts = [Expert(spec, GPT_OSS, has_bias=True) for _ in range(NUM_EXPERTS)]
    x = torch.randn(1, HIDDEN).bfloat16()
    order, weights = [3, 1, 4, 0], [0.5, 0.3, 0.2, 0.1]
    together = routed(experts, x, order, weights)
    assert torch.equal(routed(experts, x, order, weights, [0], [4], [1], [3]), together)
    assert torch.equal(routed(experts, x, order, weights, [1, 0], [4, 3]), together)
    assert torch.equal(routed(experts, x, order, weights, [3], [0, 4, 1]), together)


def test_bits_do_not_depend_on_the_number_of_threads(backend: str) -> None:
    torch.manual_seed(0)
    hidden = 1024  # enough work for several threads to take part
    fmt, activation = get_format("nf4"), Activation("sigmoid")
    up = [(fmt, (2 * hidden, hidden), fmt.quantize(torch.randn(2 * hidden, hidden)))]
    down = (fmt, (hidden, hidden), fmt.quantize(torch.randn(hidden, hidden)))
    mlps = [PackedMlp(up, down), PackedMlp(up, down)]
    x, results, threads = torch.randn(1, hidden), [], torch.get_num_threads()
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            for _ in range(20):
                step = MoeStep(activation, x, [0, 1], [0.5, 0.5])
                step.compute(list(enumerate(mlps)))
                results.append(step.result)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_an_expert_that_is_named_twice_counts_twice(backend: str) -> None:
    torch.manual_seed(0)
    experts = [Expert("nf4", Activation("gelu")) for _ in range(2)]
    x = torch.randn(1, HIDDEN)
    assert_near(routed(experts, x, [1, 0, 1], [0.5, 0.25, 0.125]), experts, [1, 0, 1], [0.5, 0.25, 0.125], x)


def test_outputs_from_elsewhere_take_their_place_in_the_sum(backend: str) -> None:
    torch.manual_seed(0)
    experts = [Expert("int8", Activation("relu")) for _ in range(2)]
    x, elsewhere = torch.randn(1, HIDDEN), torch.randn(1, HIDDEN)
    step = MoeStep(experts[0].activation, x, [7, 1], [0.5, 0.25])
    step.compute([(1, experts[1].mlp)])
    step.put(7, elsewhere)
    expected = 0.5 * elsewhere + 0.25 * experts[1].reference(x)
    assert torch.allclose(step.result.double(), expected.double(), rtol=1e-3, atol=1e-3)


def test_what_is_not_a_number_stays_so(backend: str) -> None:
    experts = [Expert("int8", GPT_OSS)]
    x = torch.full((1, HIDDEN), math.nan)
    assert routed(experts, x, [0], [1.0]).isnan().all()


def test_what_kernels_cannot_read_is_not_supported(backend: str) -> None:
    nf4, activation = get_format("nf4"), Activation("sigmoid")

    def part(fmt, *shape):
        return fmt, shape, fmt.quantize(torch.randn(shape))

    up, down = part(nf4, 2 * INNER, HIDDEN), part(nf4, HIDDEN, INNER)
    assert PackedMlp.supported(activation, [up], [down], None, None)
    assert not PackedMlp.supported(activation, [part(nf4, INNER, HIDDEN)], [down], None, None)
    assert not PackedMlp.supported(activation, [up], [part(nf4, 64, INNER)], None, None)
    assert not PackedMlp.supported(activation, [up], [down], torch.zeros(INNER), None)
    assert not PackedMlp.supported(activation, [up], [down], torch.zeros(2 * INNER, dtype=torch.float64), None)
    with kernels.forced("torch"):
        assert not PackedMlp.supported(activation, [up], [down], None, None)
