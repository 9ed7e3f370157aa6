"""Least frequently used."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# A count and, below it, the time of the last use: 2^21 uses and 2^32 events fit a float64 together.
EVENT_WEIGHT = 2.0**-32


class LfuPolicy:
    """Keeps what was asked for most often since the start; of equals, the one used last."""

    def __init__(self, num_experts: Sequence[int]) -> None:
        self._counts = [np.zeros(n, dtype=np.float64) for n in num_experts]
        self._last_use = [np.zeros(n, dtype=np.float64) for n in num_experts]
        self._events = [0] * len(num_experts)

    def touch(self, layer_idx: int, expert_ids: Sequence[int], weights: Sequence[float] | None) -> None:
        counts, last_use = self._counts[layer_idx], self._last_use[layer_idx]
        self._events[layer_idx] += 1
        now = self._events[layer_idx] * EVENT_WEIGHT
        for expert_idx in expert_ids:
            counts[expert_idx] += 1.0
            last_use[expert_idx] = now

    def scores(self, layer_idx: int) -> NDArray[np.float64]:
        scores: NDArray[np.float64] = self._counts[layer_idx] + self._last_use[layer_idx]
        return scores

    def new_sequence(self) -> None:
        """Counts are kept for good."""
