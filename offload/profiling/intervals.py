"""Time covered by intervals that overlap."""

import numpy as np

from moe_offload.cache.trace import Array


def union_us(begin_us: Array, end_us: Array) -> int:
    """Length of what the intervals cover, each moment counted once."""
    if not len(begin_us):
        return 0
    order = np.argsort(begin_us, kind="stable")
    begin, end = begin_us[order].astype(np.int64), end_us[order].astype(np.int64)
    reached = np.maximum.accumulate(end)
    # Each adds what lies beyond everything that began before it.
    before = np.concatenate([[begin[0]], reached[:-1]])
    return int((end - np.maximum(begin, before)).clip(0).sum())
