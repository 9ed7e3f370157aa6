"""What a cache of any policy and size would have done in a recorded run."""

import ctypes
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from moe_offload.cache import kernels, replay_python
from moe_offload.cache.counts import LayerStats, PhaseCounts, StatsSnapshot
from moe_offload.cache.policy import Policy
from moe_offload.cache.registry import policy_names
from moe_offload.cache.replay_events import Counting, ReplayEvents, events_of, num_experts_of
from moe_offload.cache.replay_python import BELADY
from moe_offload.cache.replay_result import ReplayResult
from moe_offload.cache.trace import RoutingTrace
from moe_offload.errors import ConfigError

MakePolicy = Callable[[Sequence[int]], Policy]
Slots = int | Sequence[int]


def replay(
    trace: RoutingTrace,
    *,
    policy: str | MakePolicy = "decay",
    num_slots: Slots | None = None,
    counting: Counting = "run",
) -> ReplayResult:
    """What a cold cache would have counted.

    ``policy``: a name, ``"belady"`` for the optimum, or anything that makes a `Policy` of the layers' sizes, which
    runs in Python. ``num_slots``: of every layer, or one number for each; those of the recorded run where it is left
    out. ``counting``: see `events_of`. ConfigError for sizes that no cache could have, and policies that there are not.
    """
    events = events_of(trace, counting)
    slots = slots_by_layer(events, trace.num_slots if num_slots is None else num_slots)
    counts, fetched = run(events, policy, slots)
    is_prefill = np.zeros(trace.num_tokens, np.bool_) if trace.phase is None else trace.phase == 0
    return ReplayResult(
        policy if isinstance(policy, str) else getattr(policy, "__name__", "policy"),
        tuple(slots.tolist()),
        None,
        snapshot(counts),
        int((~is_prefill).sum()),
        int(is_prefill.sum()),
        None if trace.expert_bytes is None else tuple(trace.expert_bytes.tolist()),
        events,
        fetched,
    )


def belady(trace: RoutingTrace, *, num_slots: Slots | None = None, counting: Counting = "run") -> ReplayResult:
    """The most hits that any policy could have had: evicted is what is needed again last.

    Where prompts evict only what is colder, colder means the same: needed again later.
    """
    return replay(trace, policy=BELADY, num_slots=num_slots, counting=counting)


def replay_policies() -> tuple[str, ...]:
    """Every name that `replay` takes, the optimum last."""
    return (*dict.fromkeys((*policy_names(), *kernels.policy_names())), BELADY)


def slots_by_layer(events: ReplayEvents, num_slots: Slots | npt.NDArray[np.int32] | None) -> npt.NDArray[np.int32]:
    """One number for each layer; ConfigError for sizes that no cache of these layers could have."""
    if num_slots is None:
        raise ConfigError("the trace does not tell how many slots its layers had; give a number of slots")
    slots = np.array(num_slots, np.int64).reshape(-1)
    if slots.size == 1:
        slots = np.full(events.num_layers, slots[0])
    if slots.size != events.num_layers:
        raise ConfigError(
            f"{slots.size} numbers of slots for {events.num_layers} layers; give one for all, or for each"
        )
    wrong = np.flatnonzero((slots < 1) | (slots > events.num_experts))
    if wrong.size:
        layer_idx = int(wrong[0])
        raise ConfigError(
            f"layer {layer_idx} cannot have {slots[layer_idx]} slots: it needs at least 1 and has use for at most "
            f"{events.num_experts[layer_idx]}, one for each expert"
        )
    return np.ascontiguousarray(slots, np.int32)


def share_of_slots(trace: RoutingTrace, share: float) -> tuple[int, ...]:
    """Slots for this share of each layer's experts, and for those of one token at least."""
    return tuple(
        min(int(num_experts), max(trace.top_k, round(share * int(num_experts))))
        for num_experts in num_experts_of(trace)
    )


def run(
    events: ReplayEvents, policy: str | MakePolicy, num_slots: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint16]]:
    """Counts [layers, 2, 5], prompts first, the fields as in `PhaseCounts`; and the experts that each event fetched."""
    library = kernels.library()
    if isinstance(policy, str) and library is not None and policy in (*kernels.policy_names(), BELADY):
        counts = np.zeros((events.num_layers, 2, 5), np.int64)
        fetched = np.zeros(events.num_events, np.uint16)
        status = library.moe_cache_replay_layers(
            ctypes.byref(native(events)),
            None if policy == BELADY else policy.encode(),
            num_slots.ctypes.data,
            counts.ctypes.data,
            fetched.ctypes.data,
        )
        if status:
            raise MemoryError(f"no memory to replay {events.num_events} events")
        return counts, fetched
    if isinstance(policy, str):
        if policy not in replay_policies():
            raise ConfigError(f"unknown policy {policy!r}; choose one of: {', '.join(replay_policies())}")
        say_slow()
    return replay_python.run(events, policy, num_slots)


def say_slow() -> None:
    """Once a place, as warnings are: this runs in Python."""
    warnings.warn(
        "the compiled library of the cache was not built: replay runs in Python, a hundred times slower; "
        "install a C++ compiler and install moe-offload again",
        RuntimeWarning,
        stacklevel=3,
    )


def native(events: ReplayEvents) -> kernels.Events:
    """As the library takes them; valid while ``events`` is."""

    def address(array: npt.NDArray[np.generic] | None) -> int | None:
        return None if array is None else array.ctypes.data

    return kernels.Events(
        address(events.kind),
        address(events.is_prefill),
        address(events.layer_idx),
        address(events.begin),
        address(events.expert_ids),
        address(events.weights),
        address(events.token_ids),
        address(events.num_experts),
        events.num_events,
        events.num_layers,
    )


def snapshot(counts: npt.NDArray[np.int64]) -> StatsSnapshot:
    return StatsSnapshot(
        tuple(
            LayerStats(decode=PhaseCounts(*decode), prefill=PhaseCounts(*prefill))
            for prefill, decode in counts.tolist()
        )
    )
