"""What a weight format is."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class ErrorBound(NamedTuple):
    """|w - dequantize(quantize(w))| <= of_block_max * max|w in its block| + of_weight * |w| + absolute."""

    of_block_max: float = 0.0
    of_weight: float = 0.0
    absolute: float = 0.0


class Format(Protocol):
    """How a weight is held in memory and computed with.

    A packed weight is a contiguous uint8 tensor of ``nbytes(shape)`` bytes, a multiple of 64, that may be a view into
    a larger buffer at any multiple of 64 bytes. Everything below is deterministic in its inputs' values alone.
    Shapes: T rows of activations, N rows (outputs) and K columns (inputs) of the weight.
    """

    @property
    def spec(self) -> str:
        """The canonical name: ``get_format(f.spec) == f``."""

    @property
    def is_raw(self) -> bool:
        """Whether the packed bytes are simply the weight in a torch dtype."""

    @property
    def error_bound(self) -> ErrorBound:
        """How far a weight can be from its packed self."""

    def bits_per_weight(self) -> float:
        """Bits a weight takes in a large matrix, scales included."""

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Exact bytes of a packed weight; raises FormatError where the format cannot hold the shape."""

    def quantize(self, weight: Tensor) -> Tensor:
        """Pack fp32, bf16 or fp16 [N, K]; raises FormatError on NaN, infinity, or a scale out of range."""

    def dequantize(self, packed: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The weight [N, K]: code x scale in fp32, rounded once to ``dtype``."""

    def linear(self, x: Tensor, packed: Tensor, shape: tuple[int, int], out_dtype: torch.dtype | None = None) -> Tensor:
        """x [T, K] @ weight.T -> [T, N] in ``out_dtype`` (x's unless given); temporaries stay below 32 MiB."""
