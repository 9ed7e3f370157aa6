"""Least frequently used."""

from collections.abc import Sequence

# A score is a count and, behind the point, the time of the last use: 2^21 uses and 2^32 events share a float exactly.
EVENT = 2.0**-32


class LfuPolicy:
    """Keeps what was asked for most often since the start; of equals, the one used last."""

    def __init__(self, num_experts: Sequence[int]) -> None:
        self._scores = [[0.0] * n for n in num_experts]
        self._now = [0.0] * len(num_experts)

    def touch(self, layer_idx: int, expert_ids: Sequence[int], weights: Sequence[float] | None) -> None:
        scores = self._scores[layer_idx]
        now = self._now[layer_idx] = self._now[layer_idx] + EVENT
        for expert_idx in expert_ids:
            scores[expert_idx] = int(scores[expert_idx]) + 1 + now

    def scores(self, layer_idx: int) -> Sequence[float]:
        return self._scores[layer_idx]

    def new_sequence(self) -> None:
        """Counts are kept for good."""
