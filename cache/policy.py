"""The contract of a policy: how much each expert of a layer deserves its slot."""

from collections.abc import Sequence
from typing import Protocol


class Policy(Protocol):
    """Ranks the experts of every layer; the cache evicts the lowest of those that it may evict.

    One object serves all layers of a cache, so that a policy may learn across layers. It is called under the cache's
    lock and needs none of its own. It is told of every request, resident or not, and knows nothing of slots.
    """

    def touch(self, layer_idx: int, expert_ids: Sequence[int], weights: Sequence[float] | None) -> None:
        """Record one event of the layer: a step asked for these experts, best first.

        ``weights``, if known, says how much of each: router probabilities in decode, shares of the tokens in prefill.
        """

    def scores(self, layer_idx: int) -> Sequence[float]:
        """One number per expert, higher stays longer; only the order means anything.

        May be the policy's own state: valid until the next call, not to be written to.
        """

    def new_sequence(self) -> None:
        """Another text begins."""
