"""The kernel of a gated delta net against plain torch, on every backend that can run here."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from moe_offload.quant import get_format, kernels
from moe_offload.quant.blocked import BlockedFormat
from moe_offload.quant.delta_net import DeltaNetCall, DeltaNetWeights
from moe_offload.quant.step_weights import Norm, PackedProjection, RawWeight

BACKENDS = [name for name in kernels.available() if name != "torch"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Of a result's largest number: what is rounded on the way is normalised, and fed back.
TOLERANCE = {torch.bfloat16: 6 * 2**-7, torch.float16: 6 * 2**-10, torch.float32: 6e-5}
HIDDEN, KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM, KERNEL_SIZE = 72, 2, 6, 24, 40, 4
KEYS, VALUES = KEY_HEADS * KEY_DIM, VALUE_HEADS * VALUE_DIM
CHANNELS = 2 * KEYS + VALUES

pytestmark = pytest.mark.skipif(not BACKENDS, reason="no kernels were built")


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest) -> Any:
    with kernels.forced(request.param):
        yield request.param


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, std: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std).to(dtype)


def linear(rows: int, cols: int, dtype: torch.dtype, seed: int) -> RawWeight:
    return RawWeight(random(rows, cols, dtype=dtype, seed=seed, std=1.5 * cols**-0.5))


def make_weights(dtype: torch.dtype) -> DeltaNetWeights:
    return DeltaNetWeights(
        mixed=linear(CHANNELS, HIDDEN, dtype, 1),
        gate=linear(VALUES, HIDDEN, dtype, 2),
        beta=linear(VALUE_HEADS, HIDDEN, dtype, 3),
        decay=linear(VALUE_HEADS, HIDDEN, dtype, 4),
        output=linear(HIDDEN, VALUES, dtype, 5),
        norm=Norm(random(VALUE_DIM, dtype=dtype, seed=6), 1e-6, True),
        convolution=random(CHANNELS, KERNEL_SIZE, dtype=dtype, seed=7, std=0.7),
        decay_bias=random(VALUE_HEADS, dtype=dtype, seed=8),
        decay_log=random(VALUE_HEADS, seed=9, std=0.5),
        num_key_heads=KEY_HEADS,
        num_value_heads=VALUE_HEADS,
        key_dim=KEY_DIM,
        value_dim=VALUE_DIM,
    )


def grouped(weights: Any) -> DeltaNetWeights:
    """The same with the rows of each key head together, as Qwen3-Next has them."""
    query, key, value = weights.mixed.weight.split([KEYS, KEYS, VALUES])
    parts = (query, key, value, weights.gate.weight)
    mixed = torch.cat([part.view(KEY_HEADS, -1, HIDDEN) for part in parts], 1).reshape(-1, HIDDEN)
    parts = (weights.beta.weight, weights.decay.weight)
    beta = torch.cat([part.view(KEY_HEADS, -1, HIDDEN) for part in parts], 1).reshape(-1, HIDDEN)
    return replace(weights, mixed=RawWeight(mixed), gate=None, beta=RawWeight(beta), decay=None)


class Case:
    """A token's inputs, and the states before it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.x = random(1, 1, HIDDEN, dtype=dtype, seed=10)
        self.past = random(1, CHANNELS, KERNEL_SIZE, dtype=dtype, seed=11)
        self.state = random(1, VALUE_HEADS, KEY_DIM, VALUE_DIM, seed=12)

    def run(self, weights: DeltaNetWeights) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the kernel gives, and the states after."""
        return DeltaNetCall(weights, self.x.dtype)(self.x, self.past, self.state).view(-1), self.past, self.state

    def expected(self, weights: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same in float64."""

        def project(projection: Any, row: torch.Tensor) -> torch.Tensor:
            return F.linear(row, projection.weight.double())

        row = self.x.double().view(-1)
        past = torch.cat([self.past.double()[0, :, 1:], project(weights.mixed, row)[:, None]], 1)
        mixed = F.silu((past * weights.convolution.double()).sum(1))
        query, key, value = mixed.split([KEYS, KEYS, VALUES])
        query, key = (
            (head * torch.rsqrt(head.pow(2).sum(-1, keepdim=True) + 1e-6)).repeat_interleave(
                VALUE_HEADS // KEY_HEADS, 0
            )
            for head in (query.view(KEY_HEADS, KEY_DIM), key.view(KEY_HEADS, KEY_DIM))
        )
        beta = project(weights.beta, row).sigmoid()
        slope = F.softplus(project(weights.decay, row) + weights.decay_bias.double())
        state = self.state.double()[0] * (-weights.decay_log.double().exp() * slope).exp()[:, None, None]
        answered = (key[:, None] @ state).squeeze(1)
        delta = (value.view(VALUE_HEADS, VALUE_DIM) - answered) * beta[:, None]
        state = state + key[:, :, None] * delta[:, None]
        out = ((query * KEY_DIM**-0.5)[:, None] @ state).squeeze(1)
        out = out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + weights.norm.epsilon) * weights.norm.weight.double()
        out = out.view(-1) * F.silu(project(weights.gate, row))
        return project(weights.output, out), past[None], state[None]


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert float((found.double() - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_delta_net(dtype):
    case, weights = Case(dtype), make_weights(dtype)
    expected = case.expected(weights)
    for result, wanted in zip(case.run(weights), expected, strict=True):
        assert_close(result, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_projections_together_are_the_same(dtype):
    weights = make_weights(dtype)
    for one, other in zip(Case(dtype).run(weights), Case(dtype).run(grouped(weights)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("spec", ["nf4", "int8"])
def test_packed_weights(spec):
    weights = make_weights(torch.float32)
    weight_format = get_format(spec)
    assert isinstance(weight_format, BlockedFormat)
    plain: dict[str, Any] = {}
    packed: dict[str, Any] = {}
    for name in ("mixed", "gate", "output"):
        raw = getattr(weights, name)
        shape = tuple(raw.weight.shape)
        stored = weight_format.quantize(raw.weight)
        plain[name] = RawWeight(weight_format.dequantize(stored, shape, torch.float32))
        packed[name] = PackedProjection(stored, weight_format.layout(shape), weight_format.code)
    case = Case(torch.float32)
    expected = case.expected(replace(weights, **plain))[0]
    # Kernels may round activations, to sixteen bits and not fewer.
    assert_close(case.run(replace(weights, **packed))[0], expected, 3e-3)


def test_the_same_bits_for_any_number_of_threads():
    weights = make_weights(torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(Case(torch.bfloat16).run(weights))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
