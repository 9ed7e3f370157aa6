"""One token through multi-head latent attention in one call to the C++ kernels."""

import ctypes
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from moe_offload.quant.kernels import DTYPES
from moe_offload.quant.step_weights import (
    Norm,
    NormStructure,
    PackedProjection,
    ProjectionStructure,
    RawWeight,
    check,
    entry,
    norm_structure,
    projection_structure,
)
from moe_offload.quant.threads import num_threads


class Rotary(IntEnum):
    """How what rotates of a head turns; the numbers are step.h's."""

    HALVES = 0  # pairs (i, i + half)
    PAIRS_TO_HALVES = 1  # pairs (2i, 2i + 1) that come out as (i, i + half)
    PAIRS = 2  # pairs (2i, 2i + 1) that stay in place, by complex numbers
    NONE = 3


class _LatentAttention(ctypes.Structure):
    _fields_ = (
        *((name, ProjectionStructure) for name in ("query_down", "query", "latent", "expand", "output")),
        *((name, NormStructure) for name in ("query_norm", "latent_norm")),
        *((name, ctypes.c_int64) for name in ("num_heads", "nope_dim", "rope_dim", "value_dim", "rank")),
        ("scaling", ctypes.c_float),
        ("query_factor", ctypes.c_float),
        ("latent_factor", ctypes.c_float),
        ("rotary", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    )


_ARGUMENTS = (
    ctypes.c_int,  # instruction set
    ctypes.c_void_p,  # attention
    ctypes.c_void_p,  # x
    ctypes.c_void_p,  # cos
    ctypes.c_void_p,  # sin
    ctypes.c_void_p,  # latents
    ctypes.c_void_p,  # keys
    ctypes.c_int64,  # position of the token
    ctypes.c_void_p,  # out
    ctypes.c_int,  # threads
)


@dataclass(frozen=True)
class LatentAttentionWeights:
    """What one module of multi-head latent attention holds.

    ``query`` takes hidden states, or what ``query_down`` and ``query_norm`` make of them. ``latent`` [rank + rope_dim,
    hidden]; ``expand`` [heads * (nope_dim + value_dim), rank], without a bias. A query head is [nope_dim + rope_dim].
    ``query_factor`` and ``latent_factor`` are on queries and normed latents, which are rounded after.
    """

    query_down: RawWeight | PackedProjection | None
    query_norm: Norm | None
    query: RawWeight | PackedProjection
    latent: RawWeight | PackedProjection
    latent_norm: Norm
    expand: RawWeight | PackedProjection
    output: RawWeight | PackedProjection
    num_heads: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    rank: int
    scaling: float
    rotary: Rotary
    query_factor: float = 1.0
    latent_factor: float = 1.0


class LatentAttentionCall:
    """One token through a module of multi-head latent attention, from hidden states to hidden states."""

    def __init__(self, weights: LatentAttentionWeights, dtype: torch.dtype) -> None:
        self.weights = weights  # keeps the memory
        w = weights
        self._structure = _LatentAttention(
            *(projection_structure(p) for p in (w.query_down, w.query, w.latent, w.expand, w.output)),
            *(norm_structure(norm) for norm in (w.query_norm, w.latent_norm)),
            *(w.num_heads, w.nope_dim, w.rope_dim, w.value_dim, w.rank),
            *(w.scaling, w.query_factor, w.latent_factor),
            w.rotary,
            DTYPES[dtype],
        )
        self._address = ctypes.addressof(self._structure)

    def __call__(
        self, x: Tensor, cos: Tensor | None, sin: Tensor | None, latents: Tensor, keys: Tensor, position: int
    ) -> Tensor:
        """``x [1, 1, hidden]``; ``cos`` and ``sin`` of one token [rope_dim].

        For `Rotary.PAIRS` ``cos`` is complex [rope_dim / 2], and there is no ``sin``; for `Rotary.NONE` neither. The
        token's latent and rotated key are written at ``position`` of ``latents`` [1, 1, capacity, rank] and of ``keys``
        [1, 1, capacity, rope_dim]; it attends to all up to itself. All contiguous, and of one dtype but for
        complex numbers.
        """
        function, isa = entry("moe_offload_latent_attention", _ARGUMENTS)
        out = torch.empty_like(x)
        status = function(
            isa,
            self._address,
            x.data_ptr(),
            None if cos is None else cos.data_ptr(),
            None if sin is None else sin.data_ptr(),
            latents.data_ptr(),
            keys.data_ptr(),
            position,
            out.data_ptr(),
            num_threads(),
        )
        check(status)
        return out
