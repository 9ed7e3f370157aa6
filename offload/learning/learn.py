"""From traces of a model to a predictor, and what it is worth on texts that it was not fitted on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moe_offload.cache import Policy, RoutingTrace
from moe_offload.cache.learned import LearnedWeights, make_learned_policy
from moe_offload.cache.replay import belady, replay, share_of_slots
from moe_offload.cache.replay_result import ReplayResult
from moe_offload.offload.learning.examples import decode_tokens, examples_of, split
from moe_offload.offload.learning.network import fit

SHARES = (0.25, 0.5)
APART = 0.15  # of the tokens: they say when to stop, and how good it is


@dataclass(frozen=True)
class Gain:
    """Hit ratios of decode on the texts that were kept apart, with slots for a share of the experts."""

    share: float
    lru: float
    recall: float
    learned: float
    belady: float

    def gap_closed(self, policy: str) -> float | None:
        """Share of the way from LRU to Belady's optimum."""
        return None if self.belady == self.lru else (getattr(self, policy) - self.lru) / (self.belady - self.lru)


@dataclass(frozen=True, eq=False)
class Lesson:
    """What was learnt, from how much, and what it is worth."""

    weights: LearnedWeights
    num_tokens: int  # fitted on
    num_apart: int
    gains: tuple[Gain, ...]


def learn(
    traces: Sequence[RoutingTrace], num_experts: Sequence[int], on_epoch: Callable[[int, float], None] | None = None
) -> Lesson:
    """Fit a predictor to a model with so many experts in each layer.

    ``on_epoch`` is told each epoch and its loss on what was kept apart. ConfigError for traces of another model, and
    for too few tokens. Takes a core a few seconds for every thousand tokens of a small model.
    """
    decoded = decode_tokens(traces, num_experts)
    kept, apart = split(decoded, APART)
    of_kept, of_apart = examples_of(kept, num_experts), examples_of(apart, num_experts)
    weights = fit(of_kept, of_apart, num_experts, on_epoch or (lambda epoch, loss: None))
    return Lesson(
        weights,
        of_kept.num_tokens,
        of_apart.num_tokens,
        tuple(gain(apart, num_experts, weights, share) for share in SHARES),
    )


def gain(traces: Sequence[RoutingTrace], num_experts: Sequence[int], weights: LearnedWeights, share: float) -> Gain:
    """What the predictor is worth on these traces, from a cold cache on."""

    def ratio(of_trace: Callable[[RoutingTrace, tuple[int, ...]], ReplayResult]) -> float:
        counts = [
            of_trace(trace, share_of_slots(trace, share)).stats.decode
            for trace in (replace_sizes(trace, num_experts) for trace in traces)
            if trace.num_tokens
        ]
        return sum(count.hits for count in counts) / sum(count.requests for count in counts)

    def learned(num_experts: Sequence[int]) -> Policy:
        return make_learned_policy(weights)

    return Gain(
        share,
        lru=ratio(lambda trace, slots: replay(trace, policy="lru", num_slots=slots, counting="token")),
        recall=ratio(lambda trace, slots: replay(trace, policy="recall", num_slots=slots, counting="token")),
        learned=ratio(lambda trace, slots: replay(trace, policy=learned, num_slots=slots, counting="token")),
        belady=ratio(lambda trace, slots: belady(trace, num_slots=slots, counting="token")),
    )


def replace_sizes(trace: RoutingTrace, num_experts: Sequence[int]) -> RoutingTrace:
    """As a trace that tells how many experts there are."""
    return replace(trace, num_experts=np.array(num_experts, np.int32))
