"""Cutting a matrix into tiles of rows, so that temporaries stay small whatever the matrix."""

from collections.abc import Iterator

# 8 MiB in fp32, 4 in bf16. Not smaller: each tile costs a fork and join of torch's threads, which takes milliseconds
# when something else has one of the cores.
TILE_WEIGHTS = 1 << 21


def row_tiles(
    num_rows: int, num_cols: int, *, multiple_of: int = 1, tile_weights: int = TILE_WEIGHTS
) -> Iterator[slice]:
    """Slices that cover the rows; each but the last a multiple of ``multiple_of`` rows long."""
    rows = max(1, tile_weights // max(1, num_cols * multiple_of)) * multiple_of
    for start in range(0, num_rows, rows):
        yield slice(start, min(start + rows, num_rows))
