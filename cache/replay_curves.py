"""Hits against the number of slots."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_offload.cache import kernels, replay_python
from moe_offload.cache.counts import Phase
from moe_offload.cache.replay import MakePolicy, policy_label, run, slots_by_layer
from moe_offload.cache.replay_arrays import Counting, ReplayEvents
from moe_offload.cache.replay_events import events_of
from moe_offload.cache.replay_python import BELADY, say_slow
from moe_offload.cache.trace import RoutingTrace
from moe_offload.errors import ConfigError

LRU = "lru"
_NUM_SIZES = 16
_PHASES: tuple[Phase, ...] = ("prefill", "decode")


@dataclass(frozen=True, eq=False)
class Curve:
    """The hits of one policy at several sizes, of a layer with fewer experts than slots as if it had all of them."""

    policy: str
    sizes: tuple[int, ...]  # slots of each layer
    hits: npt.NDArray[np.int64]  # [sizes, layers, 2], prompts first
    requests: npt.NDArray[np.int64]  # [layers, 2]

    def hit_ratio(self, phase: Phase = "decode") -> tuple[float, ...]:
        """At each size, over all layers; 0 without requests."""
        at = _PHASES.index(phase)
        requests = int(self.requests[:, at].sum())
        return tuple((self.hits[:, :, at].sum(1) / max(1, requests)).tolist())

    def layer_hit_ratio(self, phase: Phase = "decode") -> npt.NDArray[np.float64]:
        """[sizes, layers]"""
        at = _PHASES.index(phase)
        ratio: npt.NDArray[np.float64] = self.hits[:, :, at] / np.maximum(1, self.requests[:, at])
        return ratio

    def knee(self, phase: Phase = "decode") -> int:
        """The size from where more slots bring less than they did on average: farthest above the straight line.

        Satopaa, Albrecht, Irwin, Raghavan: "Finding a 'Kneedle' in a Haystack", ICDCS Workshops 2011.
        """
        sizes, ratios = np.array(self.sizes, float), np.array(self.hit_ratio(phase))
        if len(sizes) < 3:
            return self.sizes[0]
        line = np.interp(sizes, sizes[[0, -1]], ratios[[0, -1]])
        return self.sizes[int((ratios - line).argmax())]


def curve(
    trace: RoutingTrace,
    policy: str | MakePolicy,
    sizes: Sequence[int] | None = None,
    *,
    counting: Counting = "run",
) -> Curve:
    """Hits at ``sizes``, or at some from one token's experts up to all; for LRU in one pass where that is exact."""
    events = events_of(trace, counting)
    sizes = default_sizes(events) if sizes is None else _checked(sizes, events)
    if policy == LRU and events.always_admits and min(sizes) >= events.most_asked().max():
        return _lru(events, sizes)
    hits = []
    for size in sizes:
        slots = np.minimum(events.num_experts, size).astype(np.int32)
        counts, _ = run(events, policy, slots_by_layer(events, slots))
        hits.append(counts[:, :, 1])
    return Curve(
        policy_label(policy),
        tuple(sizes),
        np.array(hits),
        counts[:, :, 0],
    )


def lru_curve(trace: RoutingTrace, *, counting: Counting = "token") -> Curve:
    """Every size from one token's experts to all of them, in one pass by stack distances (Mattson et al. 1970).

    Where prompts evict only what is colder, a larger cache need not hold what a smaller one does, and there is no such
    pass: ConfigError for ``counting="run"`` of a trace with prompts.
    """
    events = events_of(trace, counting)
    if not events.always_admits:
        raise ConfigError(
            "the trace has prompts, which evict only what is colder: no single pass gives LRU at every size then; "
            'use curve(trace, "lru"), or counting="token"'
        )
    return _lru(events, list(range(int(events.most_asked().max()), int(events.num_experts.max()) + 1)))


def belady_curve(trace: RoutingTrace, sizes: Sequence[int] | None = None, *, counting: Counting = "run") -> Curve:
    """The optimum at each size, a pass each."""
    return curve(trace, BELADY, sizes, counting=counting)


def default_sizes(events: ReplayEvents) -> list[int]:
    """From the experts of one token to all experts, evenly."""
    least, most = int(events.most_asked().max()), int(events.num_experts.max())
    return sorted({round(size) for size in np.linspace(max(1, least), most, _NUM_SIZES)})


def _lru(events: ReplayEvents, sizes: Sequence[int]) -> Curve:
    found = stack_distances(events)
    # A size holds whatever lies above it; the last column is of first uses, which no size holds.
    hits = np.concatenate([np.zeros((*found.shape[:2], 1), np.int64), found[:, :, :-1].cumsum(2)], 2)
    return Curve(LRU, tuple(sizes), hits[:, :, list(sizes)].transpose(2, 0, 1), found.sum(2))


def stack_distances(events: ReplayEvents) -> npt.NDArray[np.int64]:
    """[layers, 2, experts + 1], prompts first: how often an expert was so deep in its stack; last, first uses."""
    most = int(events.num_experts.max())
    library = kernels.library()
    if library is None:
        say_slow()
        return replay_python.stack_distances(events)
    found = np.zeros((events.num_layers, 2, most + 1), np.int64)
    if library.moe_cache_stack_distances(ctypes.byref(events.native()), most, found.ctypes.data):
        raise MemoryError(f"no memory for the stacks of {events.num_layers} layers")
    return found


def _checked(sizes: Sequence[int], events: ReplayEvents) -> list[int]:
    most = int(events.num_experts.max())
    wrong = [size for size in sizes if not 1 <= size <= most]
    if wrong or not sizes:
        raise ConfigError(
            f"sizes must lie in 1..{most}, the experts of the largest layer, not {wrong or 'none at all'}"
        )
    return list(sizes)
