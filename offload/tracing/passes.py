"""What is noted of a forward pass while it runs: as little as can be, in lists; arrays are made of it later."""

import torch

from moe_offload.cache import Placement

Leased = tuple[list[Placement], list[Placement], list[int], list[int]]
"""What a `Lease` says: hits, misses, bypassed, and those of the hits that were prefetched."""
OPEN, FINISHED, ABORTED = range(3)


class LayerNote:
    """One layer of a pass, or a piece of it where a prompt goes through in pieces."""

    __slots__ = (
        "ahead_ns",
        "before_ns",
        "begin_ns",
        "end_ns",
        "expert_ids",
        "guesses",
        "index",
        "layer_idx",
        "leases",
        "router_ns",
        "wait_ns",
        "weights",
        "weights_given",
    )

    def __init__(
        self,
        layer_idx: int,
        before_ns: int,
        router_ns: int,
        begin_ns: int,
        index: torch.Tensor | None,
        weights: torch.Tensor | None,
    ) -> None:
        self.layer_idx = layer_idx
        self.before_ns = before_ns  # when what came before was done: the last layer's experts, or nothing of the pass
        self.router_ns = router_ns  # when its router began; 0 where that is not known
        self.begin_ns = begin_ns  # when its router had chosen
        self.end_ns = begin_ns
        self.wait_ns = self.ahead_ns = 0
        self.index, self.weights = index, weights  # [T, K], or None where a family does not say it by tokens
        self.expert_ids: list[int] = []  # of the last request to the cache
        self.weights_given: list[float] | None = None
        self.leases: list[Leased] = []
        self.guesses: list[tuple[int, bool]] = []  # prefetched into staging: expert, and whether it had arrived

    @property
    def num_rows(self) -> int:
        """Tokens, as far as the layer knows of them."""
        return 1 if self.index is None else self.index.shape[0]


class PassNote:
    """One forward pass of one thread."""

    def __init__(self, begin_ns: int, step_begin_ns: int, sequence: int, is_prompt: bool, num_sequences: int) -> None:
        self.begin_ns = self.end_ns = begin_ns
        self.step_begin_ns = self.step_end_ns = step_begin_ns  # with what is around it: head, sampling, Python
        self.sequence, self.num_sequences = sequence, num_sequences  # the first of so many in a batch
        self.is_prompt = is_prompt
        self.num_tokens = 0
        self.has_each_layer_once = True
        self.token_ids: torch.Tensor | None = None
        self.layers: list[LayerNote] = []
        # (layer_idx, layers ahead, experts, index [T, K]), best first
        self.predictions: list[tuple[int, int, list[int], torch.Tensor]] = []
        self.state = OPEN
        self.first_token = -1  # its row in the trace
        self.step = -1


class EventNote:
    """What was asked of the cache, or told to it, and in which pass."""

    __slots__ = ("expert_ids", "kind", "layer", "layer_idx", "owner", "weights")

    def __init__(
        self,
        kind: int,
        layer_idx: int,
        expert_ids: list[int],
        weights: list[float] | None = None,
        owner: PassNote | None = None,
        layer: LayerNote | None = None,
    ) -> None:
        self.kind, self.layer_idx, self.expert_ids, self.weights = kind, layer_idx, expert_ids, weights
        self.owner, self.layer = owner, layer
