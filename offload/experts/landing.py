"""An expert on its way from the disk: in which order its bytes are read, and which rows can be computed by then."""

from collections.abc import Sequence
from functools import lru_cache

from moe_offload.offload.experts.weights import ExpertWeights, MlpParts, PartLayout, Piece
from moe_offload.offload.streaming.read_queue import cut
from moe_offload.quant.layout import PackedLayout
from moe_offload.quant.moe_layer import MoeStep

# An expert of fewer chunks is computed whole: a call for each of them would cost more than it saves.
MIN_CHUNKS = 4
# Rows are computed in multiples of this, so that kernels that take some rows together find them.
_ROWS_TOGETHER = 64


def read_order(layout: PartLayout, slot_bytes: int, chunk_bytes: int) -> tuple[range, ...]:
    """The slot cut into chunks, in the order in which they are read: of each part its scales before its codes.

    A row can be computed only with its scales, which lie behind all codes. Biases, which are small, come first.
    """
    chunks = cut(slot_bytes, chunk_bytes)
    if len(chunks) < MIN_CHUNKS:
        return chunks
    pieces = [piece for stacked in layout.pieces.values() for piece in stacked]
    first = [range(piece.begin, piece.end) for piece in pieces if piece.packed is None]
    for piece in pieces:
        if piece.packed is not None:
            first += [_scales(piece, piece.packed), range(piece.begin, piece.end)]
    order: dict[range, None] = {}
    for part in first:
        order |= dict.fromkeys(chunk for chunk in chunks if chunk.start < part.stop and part.start < chunk.stop)
    return tuple(order | dict.fromkeys(chunks))


def _scales(piece: Piece, packed: PackedLayout) -> range:
    """What lies behind the codes."""
    return range(piece.begin + packed.codes_bytes, piece.end)


class LandingRows:
    """How many rows of an MLP's two products can be computed when so many chunks have been read."""

    def __init__(self, layout: PartLayout, parts: MlpParts, order: Sequence[range]) -> None:
        """``order``: chunks as `read_order` has them."""
        biases = [name for name in (parts.up_bias, parts.down_bias) if name is not None]
        self._whole = [range(piece.begin, piece.end) for name in biases for piece in layout.pieces[name]]
        self._up = [piece for name in parts.up for piece in layout.pieces[name]]
        self._down = layout.pieces[parts.down]
        self._rows = [self._after(set(order[:count])) for count in range(len(order) + 1)]

    def __getitem__(self, num_chunks: int) -> tuple[int, int]:
        """Rows of the first product and of the last, none of which is computed before all of the first."""
        return self._rows[num_chunks]

    def _after(self, landed: set[range]) -> tuple[int, int]:
        if any(_landed_bytes(part, landed) < len(part) for part in self._whole):
            return 0, 0
        up, is_whole = _ready(self._up, landed)
        return up, _ready(self._down, landed)[0] if is_whole else 0


def _ready(pieces: Sequence[Piece], landed: set[range]) -> tuple[int, bool]:
    """The first rows of stacked pieces that have landed with their scales, and whether these are all."""
    ready = 0
    for piece in pieces:
        packed = piece.packed
        assert packed is not None
        scales = _scales(piece, packed)
        if _landed_bytes(scales, landed) < len(scales):
            return ready, False
        codes = range(piece.begin, scales.start)
        rows = _landed_bytes(codes, landed) // max(1, packed.row_bytes)
        if rows < packed.num_rows:
            return ready + rows // _ROWS_TOGETHER * _ROWS_TOGETHER, False
        ready += packed.num_rows
    return ready, True


def _landed_bytes(part: range, landed: set[range]) -> int:
    """How many of its bytes, from the first on, are there."""
    reached = part.start
    for chunk in sorted(landed, key=lambda chunk: chunk.start):
        if chunk.start <= reached < chunk.stop:
            reached = chunk.stop
    return min(reached, part.stop) - part.start


_landing_rows = lru_cache(maxsize=256)(LandingRows)


class StepAhead:
    """Computes the experts of a step while they land. What comes of it counts once they are whole and verified."""

    def __init__(self, step: MoeStep, parts: MlpParts) -> None:
        self._step, self._parts = step, parts

    def compute(self, expert_idx: int, weights: ExpertWeights, order: Sequence[range], num_landed: int) -> None:
        """As many rows as the first ``num_landed`` chunks of ``order`` allow, in the slot that they land in."""
        mlp = weights.packed_mlp(self._parts)
        if mlp is not None:
            rows = _landing_rows(weights.layout, self._parts, tuple(order))[num_landed]
            self._step.compute_ahead(expert_idx, mlp, *rows)

    def forget(self, expert_idx: int) -> None:
        """Other bytes have come than those that were computed with."""
        self._step.forget_ahead(expert_idx)
