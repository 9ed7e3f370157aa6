"""What all formats with codes and scales share: validation, tiling, and the choice between kernel and plain torch."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_offload.errors import FormatError
from moe_offload.quant import kernels, reference
from moe_offload.quant.base import ErrorBound
from moe_offload.quant.layout import PackedLayout, matrix_shape
from moe_offload.quant.tiles import row_tiles

_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Up to so many rows of x, a product straight from codes beats dequantising first; fp32 has no matrix units to lose.
FEW_ROWS = {torch.bfloat16: 24, torch.float16: 64, torch.float32: 64}
# Plain torch holds several intermediates for each weight of a tile.
_REFERENCE_TILE_WEIGHTS = 1 << 18

# By format and shape: a model has few, and a decode step asks for one with every product.
_layouts: dict[tuple[str, tuple[int, ...]], PackedLayout] = {}


@dataclass(frozen=True)
class BlockedFormat(ABC):
    """A format whose weights share a scale within blocks."""

    spec: str

    @property
    def is_raw(self) -> bool:
        return False

    @property
    @abstractmethod
    def error_bound(self) -> ErrorBound: ...

    @property
    @abstractmethod
    def code(self) -> int:
        """The kernels' number for the code."""

    @abstractmethod
    def bits_per_weight(self) -> float: ...

    @abstractmethod
    def _make_layout(self, shape: tuple[int, ...]) -> PackedLayout:
        """See `layout`."""

    @abstractmethod
    def quantize_rows(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Plain torch: fp32 [n, K] -> code bytes [n, row_bytes] and scales."""

    @abstractmethod
    def codes_to_float(self, codes: Tensor) -> Tensor:
        """Plain torch: code bytes [n, row_bytes] -> what the codes stand for, fp32 [n, >= K]."""

    def layout(self, shape: tuple[int, ...]) -> PackedLayout:
        """Where codes and scales go; raises FormatError for a shape that the format cannot hold."""
        layout = _layouts.get((self.spec, shape))
        if layout is None:
            layout = _layouts[self.spec, shape] = self._make_layout(shape)
        return layout

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return self.layout(shape).total_bytes

    def quantize(self, weight: Tensor) -> Tensor:
        layout = self.layout(tuple(weight.shape))
        if weight.dtype not in _WEIGHT_DTYPES:
            raise FormatError(f"{self.spec} packs fp32, bf16 or fp16 weights, got {weight.dtype}; convert it first")
        packed = layout.empty().to(weight.device)
        if kernels.usable(weight):
            kernels.quantize(weight, packed, layout, self.code)
            return packed
        codes, scales = layout.codes(packed), layout.scales(packed)
        for rows in self._reference_tiles(layout):
            tile = weight[rows].float().contiguous()
            reference.check_finite(tile)
            codes[rows], scales[self._scale_rows(layout, rows)] = self.quantize_rows(tile)
        return packed

    def dequantize(self, packed: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        layout = self.layout(shape)
        layout.check(packed, self.spec)
        weight = torch.empty(matrix_shape(shape, self.spec), dtype=dtype, device=packed.device)
        if dtype in _WEIGHT_DTYPES and kernels.usable(packed):
            kernels.dequantize(packed, layout, self.code, slice(0, layout.num_rows), weight)
            return weight
        for rows in self._reference_tiles(layout):
            weight[rows] = self._dequantize_rows(packed, layout, rows)
        return weight

    def linear(self, x: Tensor, packed: Tensor, shape: tuple[int, int], out_dtype: torch.dtype | None = None) -> Tensor:
        layout = self.layout(shape)
        layout.check(packed, self.spec)
        if x.dim() != 2 or x.shape[1] != shape[1]:
            raise FormatError(f"x must be [T, {shape[1]}] for a {list(shape)} weight, got {list(x.shape)}")
        out = torch.empty(x.shape[0], shape[0], dtype=out_dtype or x.dtype, device=x.device)
        built = kernels.usable(x, packed) and x.dtype in _WEIGHT_DTYPES and out.dtype in _WEIGHT_DTYPES
        if built and x.shape[0] <= FEW_ROWS[x.dtype]:
            kernels.linear(x, packed, layout, self.code, out)
        elif built and x.dtype == torch.bfloat16 and kernels.multiplies_many(x):
            kernels.linear_many(x, packed, layout, self.code, out)
        elif built:
            self._linear_by_tiles(x, packed, layout, out)
        else:
            compute_dtype = _compute_dtype(x)
            x = x.to(compute_dtype).contiguous()  # strides must not matter to the result
            for rows in self._reference_tiles(layout):
                out[:, rows] = F.linear(x, self._dequantize_rows(packed, layout, rows).to(compute_dtype))
        return out

    def _linear_by_tiles(self, x: Tensor, packed: Tensor, layout: PackedLayout, out: Tensor) -> None:
        """Many rows: the weight is dequantised a tile at a time, for torch's matrix product."""
        x = x.to(_compute_dtype(x)).contiguous()  # strides must not matter to the result
        tile: Tensor | None = None
        for rows in row_tiles(layout.num_rows, layout.num_cols):
            num_rows = rows.stop - rows.start
            if tile is None:
                tile = torch.empty(num_rows, layout.num_cols, dtype=x.dtype)
            kernels.dequantize(packed, layout, self.code, rows, tile[:num_rows])
            out[:, rows] = F.linear(x, tile[:num_rows])

    def _dequantize_rows(self, packed: Tensor, layout: PackedLayout, rows: slice) -> Tensor:
        """fp32 [n, K] of a tile; ``rows`` starts at a multiple of the block's rows."""
        weight = self.codes_to_float(layout.codes(packed)[rows])
        scales = reference.scale_to_float(layout.scales(packed)[self._scale_rows(layout, rows)])
        if layout.block_rows > 1:
            scales = scales.repeat_interleave(layout.block_rows, dim=0)[: weight.shape[0]]
        whole = weight.shape[1] // layout.block_cols * layout.block_cols
        blocks = torch.unflatten(weight[:, :whole], 1, (-1, layout.block_cols)) if whole else weight[:, :0]
        if whole:
            blocks.mul_(scales[:, : blocks.shape[1], None])
        weight[:, whole:].mul_(scales[:, -1:])
        return weight[:, : layout.num_cols]

    @staticmethod
    def _reference_tiles(layout: PackedLayout) -> list[slice]:
        return list(
            row_tiles(
                layout.num_rows, layout.num_cols, multiple_of=layout.block_rows, tile_weights=_REFERENCE_TILE_WEIGHTS
            )
        )

    @staticmethod
    def _scale_rows(layout: PackedLayout, rows: slice) -> slice:
        return slice(rows.start // layout.block_rows, -(-rows.stop // layout.block_rows))


def _compute_dtype(x: Tensor) -> torch.dtype:
    # bf16 has matrix units; fp16's range is too small for a scaled weight, so it computes in fp32
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
