"""Least recently used."""

from collections.abc import Sequence


class LruPolicy:
    """Keeps what was asked for last; within one event, the router's first choice counts as the most recent."""

    def __init__(self, num_experts: Sequence[int]) -> None:
        self._last_use = [[0] * n for n in num_experts]
        self._clock = [0] * len(num_experts)

    def touch(self, layer_idx: int, expert_ids: Sequence[int], weights: Sequence[float] | None) -> None:
        last_use = self._last_use[layer_idx]
        clock = self._clock[layer_idx] + len(expert_ids)
        self._clock[layer_idx] = clock
        for rank, expert_idx in enumerate(expert_ids):
            last_use[expert_idx] = clock - rank

    def scores(self, layer_idx: int) -> Sequence[float]:
        return self._last_use[layer_idx]

    def new_sequence(self) -> None:
        """Recency does not care where a text begins."""
