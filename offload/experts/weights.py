"""One expert as kernels see it: the parts of a pack's layer, viewed in the bytes of a slot."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe_offload.errors import FormatError, PackCorruptError
from moe_offload.offload.pack.manifest import REPACK, PartSpec
from moe_offload.quant import Format, get_format
from moe_offload.quant.activation import Activation
from moe_offload.quant.blocked import BlockedFormat
from moe_offload.quant.layout import PackedLayout
from moe_offload.quant.moe_layer import PackedMlp
from moe_offload.quant.raw import RawFormat
from moe_offload.quant.slot_kernels import SlotMlp, SlotPart


@dataclass(frozen=True)
class Piece:
    """A weight, or some of its rows, and where in a slot its bytes are."""

    format: Format
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def packed(self) -> PackedLayout | None:
        """Where in it the rows are; None for what is no matrix, or is in a format that kernels do not know."""
        if len(self.shape) != 2 or not isinstance(self.format, BlockedFormat | RawFormat):
            return None
        return self.format.layout(self.shape)


@dataclass(frozen=True)
class MlpParts:
    """Which parts an expert's MLP consists of, ``up`` being stacked by rows, and what it does between its products."""

    up: tuple[str, ...]
    down: str
    activation: Activation
    up_bias: str | None = None
    down_bias: str | None = None


class PartLayout:
    """The parts of one layer's experts by parameter name; pieces ``name#0``, ``name#1`` are stacked by rows."""

    def __init__(self, parts: Sequence[PartSpec]) -> None:
        """`PackCorruptError` if a part has not the size that its format gives to its shape."""
        self.pieces: dict[str, list[Piece]] = {}
        for part in parts:
            try:
                size_bytes = get_format(part.format).nbytes(part.shape)
            except FormatError as error:
                raise PackCorruptError(f"part {part.name!r}: {error}; {REPACK}") from error
            if size_bytes != part.size_bytes:
                raise PackCorruptError(
                    f"part {part.name!r} has {part.size_bytes} bytes; {part.format} of shape {part.shape} takes "
                    f"{size_bytes}; {REPACK}"
                )
            piece = Piece(get_format(part.format), part.shape, part.offset_bytes, part.offset_bytes + part.size_bytes)
            self.pieces.setdefault(part.name.partition("#")[0], []).append(piece)

    def slot_mlp(self, parts: MlpParts) -> SlotMlp | None:
        """The MLP as kernels find it in any slot of a slab; None if it is not one that they can be told."""
        up = [part for name in parts.up for part in self._slot_parts(name)]
        down, up_bias, down_bias = map(self._slot_parts, (parts.down, parts.up_bias, parts.down_bias))
        if any(len(pieces) > 1 for pieces in (down, up_bias, down_bias)):
            return None
        biases = [pieces[0] if pieces else None for pieces in (up_bias, down_bias)]
        try:
            return SlotMlp(tuple(up), down[0], parts.activation, *biases)
        except FormatError:
            return None

    def _slot_parts(self, name: str | None) -> list[SlotPart]:
        pieces = [] if name is None else self.pieces[name]
        return [SlotPart(piece.format, piece.shape, piece.begin) for piece in pieces]


class ExpertWeights:
    """The parameters of the expert in one slot. Valid while the slot is held."""

    __slots__ = ("_mlp", "_parts", "layout", "row", "slab")

    def __init__(self, layout: PartLayout, data: torch.Tensor, slab: torch.Tensor | None = None, row: int = 0) -> None:
        """``data``: ``uint8 [slot_bytes]``, viewed and not copied; a row of ``slab``, if kernels are told rows."""
        self.layout = layout
        self.slab, self.row = data.unsqueeze(0) if slab is None else slab, row
        self._parts = {
            name: [(piece.format, piece.shape, data[piece.begin : piece.end]) for piece in pieces]
            for name, pieces in layout.pieces.items()
        }
        self._mlp: tuple[MlpParts, PackedMlp | None] | None = None

    def linear(self, name: str, hidden_states: torch.Tensor) -> torch.Tensor:
        """``x [T, in] @ W.T``, with ``W [out, in]`` left packed; ``[T, out]`` in the dtype of ``x``."""
        pieces = self._parts[name]
        if len(pieces) == 1:
            weight_format, shape, packed = pieces[0]
            return weight_format.linear(hidden_states, packed, (shape[0], shape[1]))
        outputs = [f.linear(hidden_states, packed, (shape[0], shape[1])) for f, shape, packed in pieces]
        return torch.cat(outputs, dim=-1)

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A small parameter, such as a bias, as it is."""
        ((weight_format, shape, packed),) = self._parts[name]
        return weight_format.dequantize(packed, shape, dtype)

    def packed_mlp(self, parts: MlpParts) -> PackedMlp | None:
        """The MLP as one call computes it, described once; None if it cannot be."""
        if self._mlp is None or self._mlp[0] is not parts:
            self._mlp = parts, self._describe(parts)
        return self._mlp[1]

    def _describe(self, parts: MlpParts) -> PackedMlp | None:
        up = [piece for name in parts.up for piece in self._parts[name]]
        down = self._parts[parts.down]
        up_bias, down_bias = self._vector(parts.up_bias), self._vector(parts.down_bias)
        if not PackedMlp.supported(parts.activation, up, down, up_bias, down_bias):
            return None
        return PackedMlp(up, down[0], up_bias, down_bias)

    def _vector(self, name: str | None) -> torch.Tensor | None:
        if name is None:
            return None
        ((weight_format, shape, packed),) = self._parts[name]
        assert isinstance(weight_format, RawFormat)  # packs hold vectors as they are
        return weight_format.view(packed, shape)
