"""A trace as the cache saw it: what each step asked of each layer, and what came of it."""

from dataclasses import dataclass

import numpy as np

from moe_offload.cache.trace import Array, Outcome, RoutingTrace

DECODE = 1
_HITS = (Outcome.RESIDENT, Outcome.PREFETCHED, Outcome.LATE)


@dataclass(frozen=True, eq=False)
class Steps:
    """The forward passes of a trace, in order: S of them.

    ``of_token`` [tokens] is a token's step; ``is_decode``, ``sequence``, ``num_tokens`` are [S].
    """

    of_token: Array
    is_decode: Array
    sequence: Array
    num_tokens: Array

    def __len__(self) -> int:
        return len(self.is_decode)


@dataclass(frozen=True, eq=False)
class Requests:
    """One entry per step, layer and expert asked for, sorted by layer, expert and step; ``outcome`` may be None.

    What several tokens of a step ask for is one request, as the cache counts it.
    """

    layer: Array
    expert: Array
    step: Array
    is_decode: Array
    outcome: Array | None

    @property
    def is_hit(self) -> Array | None:
        """In a slot, or on its way there."""
        return None if self.outcome is None else np.isin(self.outcome, _HITS)

    @property
    def is_late(self) -> Array | None:
        """Hits that were waited for."""
        return None if self.outcome is None else self.outcome == Outcome.LATE

    def only(self, mask: Array) -> "Requests":
        """Those that the mask picks."""
        outcome = None if self.outcome is None else self.outcome[mask]
        return Requests(self.layer[mask], self.expert[mask], self.step[mask], self.is_decode[mask], outcome)


def num_experts(trace: RoutingTrace) -> tuple[int, ...]:
    """The experts of each layer: as the trace says, else as many as the largest number that occurs."""
    if trace.num_experts is not None:
        return tuple(trace.num_experts.tolist())
    return (int(trace.experts.max(initial=0)) + 1,) * trace.num_layers


def phases(trace: RoutingTrace) -> Array:
    """``[tokens]``: 1 where a token was decoded; a trace that does not say is taken to be of decode."""
    return np.full(trace.num_tokens, DECODE, np.uint8) if trace.phase is None else trace.phase


def sequences(trace: RoutingTrace) -> Array:
    """``[tokens]``: a trace that does not say is taken to be of one sequence."""
    return np.zeros(trace.num_tokens, np.int32) if trace.sequence is None else trace.sequence


def steps_of(trace: RoutingTrace) -> Steps:
    """The steps of a trace; one that does not name them has one per decoded token, and one per prompt."""
    is_decode, sequence = phases(trace) == DECODE, sequences(trace)
    if trace.step is not None:
        num_steps = len(trace.step_us) if trace.step_us is not None else int(trace.step.max(initial=-1)) + 1
        of_token = trace.step
    else:
        begins = np.ones(trace.num_tokens, bool)
        begins[1:] = is_decode[1:] | is_decode[:-1] | (sequence[1:] != sequence[:-1])
        of_token = np.cumsum(begins) - 1
        num_steps = int(begins.sum())
    num_tokens = np.bincount(of_token, minlength=num_steps)
    # A step without tokens is of the phase and sequence of the one before it.
    first = np.full(num_steps, -1, np.int64)
    first[of_token[::-1]] = np.arange(trace.num_tokens - 1, -1, -1)
    first = np.maximum.accumulate(first).clip(0)
    return Steps(of_token, is_decode[first], sequence[first], num_tokens)


def requests_of(trace: RoutingTrace, steps: Steps) -> Requests:
    """What was asked of the cache."""
    tokens, layers, ranks = np.nonzero(trace.experts >= 0)
    experts = trace.experts[tokens, layers, ranks].astype(np.int64)
    width = max(num_experts(trace), default=1)
    key = (layers * width + experts) * max(1, len(steps)) + steps.of_token[tokens]
    key, first = np.unique(key, return_index=True)
    step = key % max(1, len(steps))
    layer, expert = np.divmod(key // max(1, len(steps)), width)
    outcome = None
    if trace.outcome is not None:
        outcome = trace.outcome[tokens[first], layers[first], ranks[first]]
        if (outcome == Outcome.UNKNOWN).all():
            outcome = None
    return Requests(layer, expert, step, steps.is_decode[step], outcome)
