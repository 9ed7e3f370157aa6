"""The kernels of a decode step's dense part against plain torch, on every backend that can run here."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from moe_offload.quant import get_format, kernels
from moe_offload.quant.blocked import BlockedFormat
from moe_offload.quant.step import AttentionCall, AttentionWeights, LinearCall, NormCall
from moe_offload.quant.step_weights import Norm, PackedProjection, RawWeight

BACKENDS = [name for name in kernels.available() if name != "torch"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Of a result's largest number: rounding to the dtype, and sums in another order.
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}

pytestmark = pytest.mark.skipif(not BACKENDS, reason="no kernels were built")


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest) -> Any:
    with kernels.forced(request.param):
        yield request.param


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, std: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std).to(dtype)


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert float((found.double() - expected.double()).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols", "tokens"), [(1, 1, 1), (7, 129, 3), (1030, 300, 1)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear(dtype, rows, cols, tokens, has_bias):
    weight, x = random(rows, cols, dtype=dtype), random(1, tokens, cols, dtype=dtype, seed=1)
    bias = random(rows, dtype=dtype, seed=2) if has_bias else None
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    found = LinearCall(RawWeight(weight, bias))(x)
    assert found.dtype == dtype
    assert_close(found, expected, TOLERANCE[dtype])


def test_linear_has_the_same_bits_for_any_number_of_threads_and_rows():
    weight, x = random(1200, 512, dtype=torch.bfloat16), random(2, 512, dtype=torch.bfloat16, seed=1)
    call = LinearCall(RawWeight(weight))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(call(x))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(call(x[1:]), results[0][1:])


@pytest.mark.parametrize(("rounds_first", "offset"), [(True, 0.0), (False, 0.0), (False, 1.0)])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"), [*((dtype, dtype) for dtype in DTYPES), (torch.bfloat16, torch.float32)]
)
def test_norm(dtype, weight_dtype, rounds_first, offset):
    weight, x = random(515, dtype=weight_dtype), random(2, 3, 515, dtype=dtype, seed=1, std=5.0)
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    expected = ((weight.float() + offset) * (wide.to(dtype).float() if rounds_first else wide)).to(dtype)
    found = NormCall(Norm(weight, 1e-6, rounds_first, offset))(x)
    differs = (found.float() - expected.float()).abs()
    assert bool((differs <= TOLERANCE[dtype] * expected.float().abs()).all())
    if dtype != torch.float32:
        assert float((differs > 0).float().mean()) <= 0.01


HEADS, KV_HEADS, DIM, HIDDEN = 6, 2, 40, 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_of_many_rows_is_that_of_each_row(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(3)
    norm = NormCall(Norm(torch.rand(1000, generator=generator).to(dtype), 1e-6, True))
    x = torch.randn(3, 171, 1000, generator=generator).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = norm(x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found.flatten(0, 1), torch.cat([norm(row.unsqueeze(0)) for row in x.flatten(0, 1)]))


def attention_weights(
    dtype: torch.dtype, *, norms: str = "none", sinks: bool = False, is_gated: bool = False
) -> AttentionWeights:
    query_size, kv_size = HEADS * DIM, KV_HEADS * DIM
    widths = {"none": None, "head": (DIM, DIM), "whole": (query_size, kv_size)}[norms]
    query_norm, key_norm = (
        Norm(random(width, dtype=dtype, seed=20 + i), 1e-6, True) if width else None
        for i, width in enumerate(widths or (0, 0))
    )
    query_rows = query_size * (2 if is_gated else 1)
    return AttentionWeights(
        query=RawWeight(random(query_rows, HIDDEN, dtype=dtype, seed=1, std=0.4), random(query_rows, dtype=dtype)),
        key=RawWeight(random(kv_size, HIDDEN, dtype=dtype, seed=2, std=0.4)),
        value=RawWeight(random(kv_size, HIDDEN, dtype=dtype, seed=3, std=0.4)),
        output=RawWeight(random(HIDDEN, query_size, dtype=dtype, seed=4, std=0.4), random(HIDDEN, dtype=dtype)),
        query_norm=query_norm,
        key_norm=key_norm,
        sinks=random(HEADS, dtype=dtype, seed=9) if sinks else None,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        scaling=0.3,
        half_tables=False,
        is_gated=is_gated,
    )


def normed(x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    if norm is None:
        return x
    rows = x.view(-1, norm.weight.shape[0])
    return (rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + norm.epsilon) * norm.weight.double()).view(-1)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    width = cos.shape[-1]
    low, high = x[..., : width // 2], x[..., width // 2 : width]
    return torch.cat([x[..., :width] * cos + torch.cat([-high, low], -1) * sin, x[..., width:]], -1)


def reference(
    weights: AttentionWeights, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, keys: Any, values: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """In float64: the result, and the token's key and value ``[kv heads, dim]``."""

    def project(projection: Any, rows: torch.Tensor) -> torch.Tensor:
        bias = None if projection.bias is None else projection.bias.double()
        return F.linear(rows, projection.weight.double(), bias)

    row, cos, sin = x.double().view(-1), cos.double().view(-1), sin.double().view(-1)
    query, gate = project(weights.query, row), None
    if weights.is_gated:
        query, gate = (part.reshape(-1) for part in query.view(HEADS, 2, DIM).unbind(1))
    query = turned(normed(query, weights.query_norm).view(HEADS, DIM), cos, sin)
    key = turned(normed(project(weights.key, row), weights.key_norm).view(KV_HEADS, DIM), cos, sin)
    value = project(weights.value, row).view(KV_HEADS, DIM)
    all_keys = torch.cat([keys.double()[0], key[:, None]], 1).repeat_interleave(HEADS // KV_HEADS, 0)
    all_values = torch.cat([values.double()[0], value[:, None]], 1).repeat_interleave(HEADS // KV_HEADS, 0)
    scores = (all_keys @ query[:, :, None]).squeeze(-1) * weights.scaling
    if weights.sinks is not None:
        scores = torch.cat([scores, weights.sinks.double()[:, None]], 1)
    shares = scores.softmax(-1)[:, : all_keys.shape[1]]
    result = (shares[:, None] @ all_values).view(-1)
    return project(weights.output, result if gate is None else result * gate.sigmoid()), key, value


@dataclass
class Case:
    """A token's inputs, and a cache with numbers before and behind its place."""

    x: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    begin: int
    position: int

    def run(self, weights: AttentionWeights, half_tables: bool = False) -> torch.Tensor:
        """What the kernel gives; the cache is as before but for the token's place."""
        before = self.keys.clone(), self.values.clone()
        count = self.cos.shape[-1] // 2 if half_tables else self.cos.shape[-1]
        cos, sin = self.cos[..., :count].contiguous(), self.sin[..., :count].contiguous()
        call = AttentionCall(replace(weights, half_tables=half_tables), self.x.dtype)
        found = call(self.x, cos, sin, self.keys, self.values, self.begin, self.position)
        for old, new in zip(before, (self.keys, self.values), strict=True):
            assert torch.equal(old[:, :, : self.position], new[:, :, : self.position])
            assert torch.equal(old[:, :, self.position + 1 :], new[:, :, self.position + 1 :])
        return found

    def expected(self, weights: AttentionWeights) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The reference's."""
        past = slice(self.begin, self.position)
        return reference(weights, self.x, self.cos, self.sin, self.keys[:, :, past], self.values[:, :, past])


def make_case(dtype: torch.dtype, *, begin: int = 0, position: int = 33, width: int = DIM) -> Case:
    angles = random(1, 1, width // 2, seed=6, std=3.0).repeat(1, 1, 2)
    shape = (1, KV_HEADS, position + 3, DIM)
    return Case(
        x=random(1, 1, HIDDEN, dtype=dtype, seed=5),
        cos=angles.cos().to(dtype),
        sin=angles.sin().to(dtype),
        keys=random(*shape, dtype=dtype, seed=7),
        values=random(*shape, dtype=dtype, seed=8),
        begin=begin,
        position=position,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"position": 0},
        {"position": 300},
        {"begin": 11, "position": 40},
        {"position": 20, "width": 16},
    ],
)
@pytest.mark.parametrize(
    "kind", [{}, {"norms": "head"}, {"norms": "whole", "sinks": True}, {"norms": "head", "is_gated": True}]
)
def test_attention(dtype, options, kind):
    case, weights = make_case(dtype, **options), attention_weights(dtype, **kind)
    expected = case.expected(weights)
    found = case.run(weights)
    assert found.dtype == dtype
    written = case.keys[0, :, case.position], case.values[0, :, case.position]
    # Queries and keys are rounded several times on their way to the scores, which a softmax makes more of.
    for result, wanted in zip((found.view(-1), *written), expected, strict=True):
        assert_close(result, wanted, 6 * TOLERANCE[dtype])


def test_tables_of_a_half_stand_for_both():
    weights = attention_weights(torch.float32)
    found = make_case(torch.float32).run(weights, half_tables=True)
    assert torch.equal(found, make_case(torch.float32).run(weights))


@pytest.mark.parametrize("spec", ["nf4", "int8"])
def test_attention_on_packed_weights(spec):
    weights = attention_weights(torch.float32)
    weight_format = get_format(spec)
    assert isinstance(weight_format, BlockedFormat)
    plain: dict[str, Any] = {}
    packed: dict[str, Any] = {}
    for name in ("query", "key", "value", "output"):
        raw = getattr(weights, name)
        shape = tuple(raw.weight.shape)
        stored = weight_format.quantize(raw.weight)
        plain[name] = RawWeight(weight_format.dequantize(stored, shape, torch.float32), raw.bias)
        packed[name] = PackedProjection(stored, weight_format.layout(shape), weight_format.code, raw.bias)
    case = make_case(torch.float32)
    expected = case.expected(replace(weights, **plain))[0]
    # Kernels may round activations, to sixteen bits and not fewer.
    assert_close(case.run(replace(weights, **packed)).view(-1), expected, 3e-3)


def test_attention_has_the_same_bits_for_any_number_of_threads():
    weights = attention_weights(torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(make_case(torch.bfloat16, position=2000).run(weights))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)
