"""Replay where no library was built, or with a policy that it does not have: the running cache itself, in Python."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import astuple
from math import inf, isnan

import numpy as np
import numpy.typing as npt

from moe_offload.cache.expert_cache import ExpertCache
from moe_offload.cache.lease import Admit
from moe_offload.cache.policy import Policy
from moe_offload.cache.replay_arrays import ReplayEvents
from moe_offload.cache.trace import EventKind

BELADY = "belady"


class BeladyPolicy:
    """An oracle over the events of a replay: who is needed again last goes first (Belady 1966)."""

    def __init__(self, events: ReplayEvents) -> None:
        self._scores = [[-inf] * n for n in events.num_experts.tolist()]
        self._after = [0.0] * len(events.expert_ids)
        layers, begins, experts = events.layer_idx.tolist(), events.begin.tolist(), events.expert_ids.tolist()
        # From the end, the latest use of an expert seen so far is the next use of the one before.
        for index in reversed(range(events.num_events)):
            scores = self._scores[layers[index]]
            uses = range(begins[index], begins[index + 1])
            for at in uses:
                self._after[at] = scores[experts[at]]
            # Those that one event asks for are told apart by their uses after it: where a prompt may displace only
            # what is colder, it matters which of them stays.
            for rank, at in enumerate(sorted(uses, key=self._after.__getitem__)):
                scores[experts[at]] = -float(index) + rank / len(uses)
        self._at = 0

    def foresee(self, layer_idx: int, expert_ids: Sequence[int]) -> None:
        """An event has come: its experts are needed again when they are."""
        for expert_idx in expert_ids:
            self._scores[layer_idx][expert_idx] = self._after[self._at]
            self._at += 1

    def touch(self, layer_idx: int, expert_ids: Sequence[int], weights: Sequence[float] | None) -> None:
        """Nothing is learnt from what was foreseen."""

    def scores(self, layer_idx: int) -> Sequence[float]:
        return self._scores[layer_idx]

    def new_sequence(self) -> None:
        """The future is known already."""


def say_slow() -> None:
    """Once a place, as warnings are: replay runs here."""
    warnings.warn(
        "the compiled library of the cache was not built: replay runs in Python, a hundred times slower; "
        "install a C++ compiler and install moe-offload again",
        RuntimeWarning,
        stacklevel=3,
    )


def run(
    events: ReplayEvents, policy: str | Callable[[Sequence[int]], Policy], num_slots: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint16]]:
    """As `moe_offload.cache.replay.run`."""
    oracle = BeladyPolicy(events) if policy == BELADY else None
    num_experts = events.num_experts.tolist()
    if oracle is not None:
        made: str | Policy = oracle
    else:
        made = policy if isinstance(policy, str) else policy(num_experts)
    cache = ExpertCache(num_experts, num_slots.tolist(), made)
    kinds, layers, begins = events.kind.tolist(), events.layer_idx.tolist(), events.begin.tolist()
    experts, is_prefill = events.expert_ids.tolist(), events.is_prefill.tolist()
    weights = None if events.weights is None else events.weights.tolist()
    fetched = np.zeros(events.num_events, np.uint16)
    for index, (kind, layer_idx) in enumerate(zip(kinds, layers, strict=True)):
        if kind == EventKind.NEW_SEQUENCE:
            cache.new_sequence()
            continue
        of_event = slice(begins[index], begins[index + 1])
        if oracle is not None:
            oracle.foresee(layer_idx, experts[of_event])
        of_experts = None if weights is None else weights[of_event]
        lease = cache.acquire(
            layer_idx,
            experts[of_event],
            weights=None if of_experts and isnan(of_experts[0]) else of_experts,
            admit=Admit.IF_HOTTER if kind == EventKind.ACQUIRE_IF_HOTTER else Admit.ALWAYS,
            phase="prefill" if is_prefill[index] else "decode",
        )
        fetched[index] = len(lease.misses) + len(lease.bypassed)
        for miss in lease.misses:
            cache.mark_loaded(layer_idx, miss.expert_idx)
        cache.release(lease)
    layer_stats = cache.stats.snapshot().layers
    counts = [[astuple(layer.prefill), astuple(layer.decode)] for layer in layer_stats]
    return np.array(counts, np.int64), fetched


def stack_distances(events: ReplayEvents) -> npt.NDArray[np.int64]:
    """As `moe_offload.cache.replay_curves.stack_distances`."""
    most = int(events.num_experts.max())
    found = np.zeros((events.num_layers, 2, most + 1), np.int64)
    stacks: list[list[int]] = [[] for _ in range(events.num_layers)]  # the most recent first
    begins, experts = events.begin.tolist(), events.expert_ids.tolist()
    for index, (layer_idx, is_prefill) in enumerate(
        zip(events.layer_idx.tolist(), events.is_prefill.tolist(), strict=True)
    ):
        stack, asked = stacks[layer_idx], experts[begins[index] : begins[index + 1]]
        for expert_idx in asked:
            depth = stack.index(expert_idx) if expert_idx in stack else most
            found[layer_idx, 1 - is_prefill, depth] += 1
        stacks[layer_idx] = asked + [expert_idx for expert_idx in stack if expert_idx not in asked]
    return found
