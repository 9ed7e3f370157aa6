"""Runs every kernel on memory that ends, or begins, at a page which may not be touched; for test_quant_bounds.py.

A process of its own: a read past the end kills it. The case at work is the last line that it prints.
"""

import ctypes
import itertools
import mmap
import sys
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from moe_offload.quant import get_format, kernels
from moe_offload.quant.activation import Activation
from moe_offload.quant.blocked import BlockedFormat
from moe_offload.quant.delta_net import DeltaNetCall, DeltaNetWeights
from moe_offload.quant.latent_step import LatentAttentionCall, LatentAttentionWeights, Rotary
from moe_offload.quant.mamba_step import MambaCall, MambaWeights
from moe_offload.quant.moe_layer import MoeStep, PackedMlp, PackedPart
from moe_offload.quant.step import AttentionCall, AttentionWeights, LinearCall, NormCall
from moe_offload.quant.step_weights import Norm, PackedProjection, RawWeight

SPECS = ("nf4", "int4", "mxfp4", "nf3", "int8", "fp8", "fp8-48x40", "bnb-nf4-64", "bnb-fp4-128", "bf16", "fp16")
SHAPES = ((1, 64), (7, 192), (48, 100), (97, 640))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEW, MANY = (1, 3, 7), (17, 80, 257)
ACTIVATIONS = (Activation("sigmoid"), Activation("gelu", "none"), Activation("sigmoid", "interleaved", 1.702))

_NO_ACCESS = 0
_held: list[mmap.mmap] = []  # tensors do not know that their memory has an end


def guarded(like: Tensor, *, at_end: bool) -> Tensor:
    """A copy whose last byte, or whose first, lies beside a page that may not be touched."""
    num_bytes = like.numel() * like.element_size()
    if num_bytes == 0:
        return like.clone()
    pages = -(-num_bytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
    _held.append(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for page in (0, pages + 1):
        place = ctypes.c_void_p(address + page * mmap.PAGESIZE)
        assert protect(place, ctypes.c_size_t(mmap.PAGESIZE), _NO_ACCESS) == 0
    begin = (pages + 1) * mmap.PAGESIZE - num_bytes if at_end else mmap.PAGESIZE
    copy = torch.frombuffer(memory, dtype=like.dtype, count=like.numel(), offset=begin).view(like.shape)
    return copy.copy_(like)


def cases() -> Iterator[tuple[str, bool]]:
    """Instruction set, and whether memory is guarded at its end."""
    return itertools.product((name for name in kernels.available() if name != "torch"), (True, False))


def products(spec: str, *, at_end: bool) -> None:
    """Quantise, dequantise, and multiply a few rows and many."""
    fmt, guard = get_format(spec), partial(guarded, at_end=at_end)
    for shape in SHAPES:
        if spec.startswith("bnb") and shape[1] % int(spec.rpartition("-")[2]):
            continue
        for dtype in DTYPES:
            print(spec, shape, dtype, flush=True)
            source = guard(torch.randn(shape).to(dtype))
            packed = guard(fmt.quantize(source))
            assert fmt.dequantize(packed, shape, dtype).isfinite().all()
            if not isinstance(fmt, BlockedFormat):
                continue
            layout = fmt.layout(shape)
            kernels.quantize(source, packed, layout, fmt.code)
            kernels.dequantize(packed, layout, fmt.code, slice(0, shape[0]), guard(torch.empty(shape, dtype=dtype)))
            for num_rows in FEW:
                x = guard(torch.randn(num_rows, shape[1]).to(dtype))
                kernels.linear(x, packed, layout, fmt.code, guard(torch.empty(num_rows, shape[0], dtype=dtype)))
            for num_rows in MANY if dtype == torch.bfloat16 and kernels.multiplies_many(packed) else ():
                x = guard(torch.randn(num_rows, shape[1]).to(dtype))
                kernels.linear_many(x, packed, layout, fmt.code, guard(torch.empty(num_rows, shape[0], dtype=dtype)))


def experts(spec: str, activation: Activation, *, at_end: bool) -> None:
    """One expert for one token, and for rows of a prompt."""
    fmt, guard = get_format(spec), partial(guarded, at_end=at_end)
    for (hidden, inner), num_pieces in itertools.product(((64, 128), (320, 192)), (1, 2)):
        print(spec, activation, hidden, inner, num_pieces, flush=True)
        rows = inner if activation.gating == "none" else 2 * inner

        def part(shape: tuple[int, int]) -> PackedPart:
            return fmt, shape, guard(fmt.quantize(torch.randn(shape)))

        up, down = [part((rows // num_pieces, hidden)) for _ in range(num_pieces)], part((hidden, inner))
        biases = guard(torch.randn(rows).bfloat16()), guard(torch.randn(hidden).bfloat16())
        assert PackedMlp.supported(activation, up, [down], *biases)
        mlp = PackedMlp(up, down, *biases)
        for dtype in DTYPES:
            step = MoeStep(activation, guard(torch.randn(1, hidden).to(dtype)), [3], [1.0])
            step.compute([(3, mlp)])
        for num_rows in MANY:
            x = guard(torch.randn(num_rows, hidden).bfloat16())
            if mlp.takes_rows(x, num_rows):
                some = guard(torch.arange(num_rows))
                out = guard(torch.empty(num_rows, hidden, dtype=torch.bfloat16))
                mlp.compute_rows(activation, x, some, out, some)


def dense(*, at_end: bool) -> None:
    """Norms, and linear layers that are not packed."""
    guard = partial(guarded, at_end=at_end)
    for dtype, width in itertools.product(DTYPES, (64, 100, 321)):
        print("dense", dtype, width, flush=True)
        x = guard(torch.randn(3, width).to(dtype))
        for rounds_first in (True, False):
            NormCall(Norm(guard(torch.randn(width).to(dtype)), 1e-6, rounds_first))(x)
        LinearCall(RawWeight(guard(torch.randn(7, width).to(dtype)), guard(torch.randn(7).to(dtype))))(x)


def attention(dtype: torch.dtype, *, at_end: bool) -> None:
    """The last token for which there is room, of a group of heads that share keys and of heads that do not."""

    def random(*shape: int) -> Tensor:
        return guarded(torch.randn(shape).to(dtype), at_end=at_end)

    hidden, num_heads, capacity = 100, 6, 9
    for num_kv_heads, head_dim, is_gated in itertools.product((2, 6), (32, 50), (True, False)):
        print("attention", dtype, num_kv_heads, head_dim, is_gated, flush=True)
        query = RawWeight(random(num_heads * head_dim * (2 if is_gated else 1), hidden))
        key, value = (RawWeight(random(num_kv_heads * head_dim, hidden)) for _ in range(2))
        norm = Norm(random(head_dim), 1e-6, True)
        call = AttentionCall(
            AttentionWeights(
                *(query, key, value, RawWeight(random(hidden, num_heads * head_dim))),
                *(norm, norm, random(num_heads), num_heads, num_kv_heads, head_dim, 0.1, False, is_gated),
            ),
            dtype,
        )
        tables = random(1, 1, head_dim), random(1, 1, head_dim)
        states = (random(1, num_kv_heads, capacity, head_dim) for _ in range(2))
        call(random(1, 1, hidden), *tables, *states, 0, capacity - 1)


def latent_attention(spec: str, dtype: torch.dtype, *, at_end: bool) -> None:
    """The same of latent attention, whose weights may be packed."""

    def random(*shape: int) -> Tensor:
        return guarded(torch.randn(shape).to(dtype), at_end=at_end)

    fmt = get_format(spec)

    def projection(*shape: int) -> RawWeight | PackedProjection:
        if not isinstance(fmt, BlockedFormat):
            return RawWeight(random(*shape))
        packed = guarded(fmt.quantize(torch.randn(shape)), at_end=at_end)
        return PackedProjection(packed, fmt.layout(shape), fmt.code)

    hidden, num_heads, capacity = 128, 5, 9
    for rank, nope_dim, rope_dim, value_dim in ((64, 24, 8, 20), (192, 70, 64, 33)):
        print("latent attention", spec, dtype, rank, flush=True)
        call = LatentAttentionCall(
            LatentAttentionWeights(
                *(projection(64, hidden), Norm(random(64), 1e-6, True)),
                projection(num_heads * (nope_dim + rope_dim), 64),
                *(projection(rank + rope_dim, hidden), Norm(random(rank), 1e-6, True)),
                projection(num_heads * (nope_dim + value_dim), rank),
                RawWeight(random(hidden, num_heads * value_dim)),
                *(num_heads, nope_dim, rope_dim, value_dim, rank, 0.1, Rotary.PAIRS_TO_HALVES),
            ),
            dtype,
        )
        tables, states = (random(1, 1, rope_dim), random(1, 1, rope_dim)), (rank, rope_dim)
        call(random(1, 1, hidden), *tables, *(random(1, 1, capacity, width) for width in states), capacity - 1)


def delta_net(dtype: torch.dtype, *, at_end: bool) -> None:
    """A token of both orders of projections."""

    def random(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return guarded(torch.randn(shape).to(of), at_end=at_end)

    hidden, key_heads, value_heads = 100, 2, 6
    for key_dim, value_dim in ((16, 32), (9, 21)):
        print("delta net", dtype, key_dim, flush=True)
        channels, values = 2 * key_heads * key_dim + value_heads * value_dim, value_heads * value_dim
        for grouped in (True, False):
            rows = (
                (channels + values, 0, 2 * value_heads, 0) if grouped else (channels, values, value_heads, value_heads)
            )
            mixed, gate, beta, decay = (RawWeight(random(count, hidden)) if count else None for count in rows)
            assert mixed is not None
            assert beta is not None
            weights = DeltaNetWeights(
                *(mixed, gate, beta, decay, RawWeight(random(hidden, values))),
                *(Norm(random(value_dim), 1e-6, True), random(channels, 4), random(value_heads), random(value_heads)),
                *(key_heads, value_heads, key_dim, value_dim),
            )
            state = random(1, value_heads, key_dim, value_dim, of=torch.float32)
            DeltaNetCall(weights, dtype)(random(1, 1, hidden), random(1, channels, 4), state)


def mamba(dtype: torch.dtype, *, at_end: bool) -> None:
    """A token, with a bias of the convolution and without."""

    def random(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return guarded(torch.randn(shape).to(of), at_end=at_end)

    hidden, num_heads, num_groups = 100, 6, 2
    for head_dim, state_size, has_bias in ((16, 32, True), (9, 21, False)):
        print("mamba", dtype, head_dim, flush=True)
        inner, width = num_heads * head_dim, num_groups * state_size
        channels = inner + 2 * width
        weights = MambaWeights(
            *(RawWeight(random(inner + channels + num_heads, hidden)), RawWeight(random(hidden, inner))),
            *(Norm(random(inner), 1e-6, True), random(channels, 4), random(channels) if has_bias else None),
            *(random(num_heads), random(num_heads), random(num_heads)),
            *(num_heads, head_dim, num_groups, state_size),
        )
        state = random(1, num_heads, head_dim, state_size, of=torch.float32)
        MambaCall(weights, dtype)(random(1, 1, hidden), random(1, channels, 4), state)


def overrun() -> None:
    """What must not survive: a weight that is shorter than its layout says."""
    fmt, shape = get_format("int8"), (7, 192)
    packed = fmt.quantize(torch.randn(shape))
    short = guarded(packed[: fmt.layout(shape).codes_bytes // 2], at_end=True)  # type: ignore[union-attr]
    x, out = torch.randn(1, shape[1]), torch.empty(1, shape[0])
    kernels.linear(x, short, fmt.layout(shape), fmt.code, out)  # type: ignore[union-attr]


def main() -> None:
    torch.manual_seed(0)
    for name, at_end in cases():
        print(name, "end" if at_end else "begin", flush=True)
        with kernels.forced(name):
            for spec in SPECS:
                products(spec, at_end=at_end)
                for activation in ACTIVATIONS if not spec.startswith("bnb") else ():
                    experts(spec, activation, at_end=at_end)
            dense(at_end=at_end)
            for dtype in DTYPES:
                attention(dtype, at_end=at_end)
                delta_net(dtype, at_end=at_end)
                mamba(dtype, at_end=at_end)
                for spec in ("bf16", "nf4", "nf3", "int8", "fp8"):
                    latent_attention(spec, dtype, at_end=at_end)
            _held.clear()
    print("done")


if __name__ == "__main__":
    overrun() if sys.argv[1:] == ["overrun"] else main()
