"""Exponentially decayed frequency."""

from collections.abc import Sequence

HALF_LIFE_EVENTS = 24
# A new text starts from nothing: what came before only decides between experts that it has not asked for yet.
NEW_SEQUENCE_HALF_LIVES = 40
RESCALE_AT = 2.0**200


class DecayPolicy:
    """Keeps what was asked for often lately: a use counts half after 24 events of the layer.

    Forward decay (Cormode, Shkapenyuk, Srivastava, Xu: "Forward Decay", ICDE 2009): instead of every count shrinking
    at every event, the weight of a new use grows, so an event costs only the experts it names, and the order is the
    same. Now and then all are scaled back into range.
    """

    def __init__(self, num_experts: Sequence[int]) -> None:
        self._counts = [[0.0] * n for n in num_experts]
        self._use_weight = [1.0] * len(num_experts)

    def touch(self, layer_idx: int, expert_ids: Sequence[int], weights: Sequence[float] | None) -> None:
        use_weight = self._grow(layer_idx, 2.0 ** (1 / HALF_LIFE_EVENTS))
        counts = self._counts[layer_idx]
        for expert_idx in expert_ids:
            counts[expert_idx] += use_weight

    def scores(self, layer_idx: int) -> Sequence[float]:
        return self._counts[layer_idx]

    def new_sequence(self) -> None:
        for layer_idx in range(len(self._counts)):
            self._grow(layer_idx, 2.0**NEW_SEQUENCE_HALF_LIVES)

    def _grow(self, layer_idx: int, factor: float) -> float:
        use_weight = self._use_weight[layer_idx] * factor
        if use_weight > RESCALE_AT:
            self._counts[layer_idx] = [count / use_weight for count in self._counts[layer_idx]]
            use_weight = 1.0
        self._use_weight[layer_idx] = use_weight
        return use_weight
