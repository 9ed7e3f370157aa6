"""The kernel of multi-head latent attention against plain torch, which expands the past, on every backend."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from moe_offload.quant import get_format, kernels
from moe_offload.quant.blocked import BlockedFormat
from moe_offload.quant.latent_step import LatentAttentionCall, LatentAttentionWeights, Rotary
from moe_offload.quant.step_weights import Norm, PackedProjection, RawWeight

BACKENDS = [name for name in kernels.available() if name != "torch"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Of a result's largest number: queries and what is cached are rounded several times, which a softmax makes more of.
TOLERANCE = {torch.bfloat16: 6 * 2**-7, torch.float16: 6 * 2**-10, torch.float32: 6e-5}
HIDDEN, DOWN, HEADS, NOPE, ROPE, VALUE, RANK = 72, 40, 7, 24, 16, 20, 70
POSITION = 33

pytestmark = pytest.mark.skipif(not BACKENDS, reason="no kernels were built")


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest) -> Any:
    with kernels.forced(request.param):
        yield request.param


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, std: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std).to(dtype)


def make_weights(dtype: torch.dtype, *, rotary: Rotary, down: bool = True, **fields: Any) -> LatentAttentionWeights:
    def linear(rows: int, cols: int, seed: int, bias: bool = False) -> RawWeight:
        return RawWeight(
            random(rows, cols, dtype=dtype, seed=seed, std=1.5 * cols**-0.5),
            random(rows, dtype=dtype, seed=seed + 50) if bias else None,
        )

    return LatentAttentionWeights(
        query_down=linear(DOWN, HIDDEN, 1, bias=True) if down else None,
        query_norm=Norm(random(DOWN, dtype=dtype, seed=2), 1e-6, True) if down else None,
        query=linear(HEADS * (NOPE + ROPE), DOWN if down else HIDDEN, 3),
        latent=linear(RANK + ROPE, HIDDEN, 4, bias=True),
        latent_norm=Norm(random(RANK, dtype=dtype, seed=5), 1e-6, True),
        expand=linear(HEADS * (NOPE + VALUE), RANK, 6),
        output=linear(HIDDEN, HEADS * VALUE, 7, bias=True),
        num_heads=HEADS,
        nope_dim=NOPE,
        rope_dim=ROPE,
        value_dim=VALUE,
        rank=RANK,
        scaling=0.3,
        rotary=rotary,
        **fields,
    )


def turned(x: torch.Tensor, angles: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """``x [..., ROPE]`` in float64, turned by ``angles [ROPE / 2]``."""
    if rotary == Rotary.NONE:
        return x
    if rotary == Rotary.HALVES:
        first, second = x.chunk(2, -1)
    else:
        first, second = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.double().cos(), angles.double().sin()
    parts = first * cos - second * sin, second * cos + first * sin
    return torch.stack(parts, -1).flatten(-2) if rotary == Rotary.PAIRS else torch.cat(parts, -1)


class Case:
    """A token's inputs, and a cache with numbers before and behind its place."""

    def __init__(self, dtype: torch.dtype, position: int = POSITION) -> None:
        self.position = position
        self.x = random(1, 1, HIDDEN, dtype=dtype, seed=10)
        self.angles = random(ROPE // 2, seed=11, std=3.0)
        self.latents = random(1, 1, position + 3, RANK, dtype=dtype, seed=12)
        self.keys = random(1, 1, position + 3, ROPE, dtype=dtype, seed=13)

    def run(self, weights: LatentAttentionWeights) -> torch.Tensor:
        """What the kernel gives; the cache is as before but for the token's place."""
        before = self.latents.clone(), self.keys.clone()
        tables: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        if weights.rotary == Rotary.PAIRS:
            tables = torch.polar(torch.ones_like(self.angles), self.angles), None
        elif weights.rotary != Rotary.NONE:
            both = self.angles.repeat(2)
            tables = both.cos().to(self.x.dtype), both.sin().to(self.x.dtype)
        call = LatentAttentionCall(weights, self.x.dtype)
        found = call(self.x, *tables, self.latents, self.keys, self.position)
        for old, new in zip(before, (self.latents, self.keys), strict=True):
            assert torch.equal(old[:, :, : self.position], new[:, :, : self.position])
            assert torch.equal(old[:, :, self.position + 1 :], new[:, :, self.position + 1 :])
        return found.view(-1)

    def written(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The token's latent and rotated key."""
        return self.latents[0, 0, self.position], self.keys[0, 0, self.position]

    def expected(self, weights: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """In float64, with keys and values of the whole past: the result, and the token's latent and rotated key."""

        def project(projection: Any, row: torch.Tensor) -> torch.Tensor:
            bias = None if projection.bias is None else projection.bias.double()
            return F.linear(row, projection.weight.double(), bias)

        def normed(row: torch.Tensor, norm: Norm) -> torch.Tensor:
            return row * torch.rsqrt(row.pow(2).mean() + norm.epsilon) * norm.weight.double()

        row = self.x.double().view(-1)
        latent, key = project(weights.latent, row).split([RANK, ROPE])
        latent = normed(latent, weights.latent_norm) * weights.latent_factor
        key = turned(key, self.angles, weights.rotary)
        if weights.query_down is not None:
            row = normed(project(weights.query_down, row), weights.query_norm)
        query = project(weights.query, row).view(HEADS, NOPE + ROPE) * weights.query_factor
        query = torch.cat([query[:, :NOPE], turned(query[:, NOPE:], self.angles, weights.rotary)], -1)
        latents = torch.cat([self.latents.double()[0, 0, : self.position], latent[None]])
        rotated = torch.cat([self.keys.double()[0, 0, : self.position], key[None]])
        expanded = project(weights.expand, latents).view(-1, HEADS, NOPE + VALUE).transpose(0, 1)
        keys = torch.cat([expanded[..., :NOPE], rotated.expand(HEADS, -1, -1)], -1)
        shares = (keys @ query[:, :, None] * weights.scaling).softmax(1)
        values = (shares.transpose(1, 2) @ expanded[..., NOPE:]).view(-1)
        return project(weights.output, values), latent, key


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert float((found.double() - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("down", [True, False])
@pytest.mark.parametrize("rotary", Rotary)
def test_latent_attention(dtype, down, rotary):
    case, weights = Case(dtype), make_weights(dtype, rotary=rotary, down=down)
    expected = case.expected(weights)
    found = case.run(weights)
    assert found.dtype == dtype
    for result, wanted in zip((found, *case.written()), expected, strict=True):
        assert_close(result, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_of_queries_and_latents(dtype):
    case = Case(dtype)
    weights = make_weights(dtype, rotary=Rotary.PAIRS_TO_HALVES, query_factor=1.7, latent_factor=0.6)
    expected = case.expected(weights)
    for result, wanted in zip((case.run(weights), *case.written()), expected, strict=True):
        assert_close(result, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("position", [0, 1, 2, 700])
def test_any_number_of_cached_tokens(position):
    case, weights = Case(torch.float32, position), make_weights(torch.float32, rotary=Rotary.PAIRS)
    expected = case.expected(weights)[0]
    assert_close(case.run(weights), expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("spec", ["nf4", "int4", "nf3", "int8", "fp8"])
def test_packed_weights(spec):
    weights = make_weights(torch.float32, rotary=Rotary.PAIRS_TO_HALVES)
    weight_format = get_format(spec)
    assert isinstance(weight_format, BlockedFormat)
    plain: dict[str, Any] = {}
    packed: dict[str, Any] = {}
    for name in ("query_down", "query", "latent", "expand", "output"):
        raw = getattr(weights, name)
        shape = tuple(raw.weight.shape)
        stored = weight_format.quantize(raw.weight)
        plain[name] = RawWeight(weight_format.dequantize(stored, shape, torch.float32), raw.bias)
        packed[name] = PackedProjection(stored, weight_format.layout(shape), weight_format.code, raw.bias)
    case = Case(torch.float32)
    expected = case.expected(replace(weights, **plain))[0]
    # Kernels may round activations, to sixteen bits and not fewer.
    assert_close(case.run(replace(weights, **packed)), expected, 3e-3)


@pytest.mark.parametrize("spec", ["bf16", "nf4"])
def test_the_same_bits_for_any_number_of_threads(spec):
    weights = make_weights(torch.bfloat16, rotary=Rotary.HALVES)
    weight_format, expand = get_format(spec), weights.expand
    if isinstance(weight_format, BlockedFormat) and isinstance(expand, RawWeight):
        layout = weight_format.layout(tuple(expand.weight.shape))
        packed = PackedProjection(weight_format.quantize(expand.weight), layout, weight_format.code)
        weights = replace(weights, expand=packed)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(Case(torch.bfloat16, position=2000).run(weights))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)
