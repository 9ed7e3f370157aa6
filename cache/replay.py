"""What a cache of any policy and size would have done in a recorded run."""

import ctypes
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from moe_offload.cache import kernels, replay_python
from moe_offload.cache.counts import LayerStats, PhaseCounts, StatsSnapshot
from moe_offload.cache.policy import Policy
from moe_offload.cache.registry import DEFAULT_POLICY, policy_names
from moe_offload.cache.replay_arrays import Counting, ReplayEvents
from moe_offload.cache.replay_events import events_of, num_experts_of
from moe_offload.cache.replay_python import BELADY
from moe_offload.cache.replay_result import ReplayResult
from moe_offload.cache.replay_timing import Lookahead, Rates, simulate_time
from moe_offload.cache.trace import RoutingTrace
from moe_offload.errors import ConfigError

MakePolicy = Callable[[Sequence[int]], Policy]
Slots = int | Sequence[int]


def replay(
    trace: RoutingTrace,
    *,
    policy: str | MakePolicy = DEFAULT_POLICY,
    num_slots: Slots | None = None,
    pool_slots: int | None = None,
    counting: Counting = "run",
    rates: Rates | None = None,
    lookahead: Lookahead | None = None,
    expert_bytes: int | Sequence[int] | None = None,
) -> ReplayResult:
    """What a cold cache would have counted.

    ``policy``: a name, ``"belady"`` for the optimum, or anything that makes a `Policy` of the layers' sizes, which
    runs in Python. ``num_slots``: of every layer, or one number for each; those of the recorded run where it is left
    out. ``pool_slots``: of all layers together instead, where each layer keeps what one token asks for.
    ``counting``: see `events_of`. With ``rates`` also the time, with what ``lookahead`` foresees brought ahead.
    ``expert_bytes``: where the trace does not tell. ConfigError for what cannot be.
    """
    events = events_of(trace, counting)
    sizes = _expert_bytes(events, trace.expert_bytes if expert_bytes is None else expert_bytes)
    if pool_slots is None:
        slots = slots_by_layer(events, trace.num_slots if num_slots is None else num_slots)
        counts, fetched = run(events, policy, slots)
    else:
        slots = np.maximum(1, events.most_asked()).astype(np.int32)
        counts, fetched = run_pool(events, policy, pool_slots, slots)
    if lookahead is not None and rates is None:
        raise ConfigError("whether a prefetch comes in time depends on the rates of the machine; give rates too")
    time = None if rates is None else simulate_time(events, fetched, sizes, rates, lookahead or Lookahead())
    return ReplayResult(
        policy=policy_label(policy),
        num_slots=tuple(slots.tolist()),
        pool_slots=pool_slots,
        stats=snapshot(counts),
        num_decode_tokens=events.num_decode_tokens,
        num_prefill_tokens=events.num_prefill_tokens,
        expert_bytes=sizes,
        events=events,
        fetched=fetched,
        time=time,
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
        return _replay_natively(library.moe_cache_replay_layers, events, policy, num_slots.ctypes.data)
    if isinstance(policy, str):
        if policy not in replay_policies():
            raise ConfigError(f"unknown policy {policy!r}; choose one of: {', '.join(replay_policies())}")
        if library is None:
            replay_python.say_slow()
    return replay_python.run(events, policy, num_slots)


def run_pool(
    events: ReplayEvents, policy: str | MakePolicy, pool_slots: int, floors: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint16]]:
    """As `run`, with one pool for all layers."""
    library = kernels.library()
    if library is None or policy not in (*kernels.policy_names(), BELADY):
        raise ConfigError(
            f"a pool takes policies of the compiled library of the cache, not {policy_label(policy)!r}; "
            f"it has: {', '.join((*kernels.policy_names(), BELADY)) if library else 'nothing, as it was not built'}"
        )
    least, most = int(floors.sum()), int(events.num_experts.sum())
    if not least <= pool_slots <= most:
        raise ConfigError(
            f"a pool of {pool_slots} slots: these layers need at least {least}, what one token asks all of them for, "
            f"and have use for at most {most}"
        )
    return _replay_natively(library.moe_cache_replay_pool, events, str(policy), pool_slots, floors.ctypes.data)


def _replay_natively(
    function: Callable[..., int], events: ReplayEvents, policy: str, *slots: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint16]]:
    """See `run`; ``slots`` are the arguments between the policy and the results."""
    counts = np.zeros((events.num_layers, 2, 5), np.int64)
    fetched = np.zeros(events.num_events, np.uint16)
    name = None if policy == BELADY else policy.encode()
    status = function(ctypes.byref(events.native()), name, *slots, counts.ctypes.data, fetched.ctypes.data)
    if status:
        raise MemoryError(f"no memory to replay {events.num_events} events")
    return counts, fetched


def policy_label(policy: str | MakePolicy) -> str:
    return policy if isinstance(policy, str) else getattr(policy, "__name__", type(policy).__name__)


def _expert_bytes(
    events: ReplayEvents, expert_bytes: int | Sequence[int] | npt.NDArray[np.int64] | None
) -> tuple[int, ...] | None:
    if expert_bytes is None:
        return None
    sizes: list[int] = np.array(expert_bytes, np.int64).reshape(-1).tolist()
    if len(sizes) not in (1, events.num_layers) or min(sizes) < 0:
        raise ConfigError(f"sizes of experts must be one for all layers, or one for each of {events.num_layers}")
    return tuple(sizes * events.num_layers if len(sizes) == 1 else sizes)


def snapshot(counts: npt.NDArray[np.int64]) -> StatsSnapshot:
    return StatsSnapshot(
        tuple(
            LayerStats(decode=PhaseCounts(*decode), prefill=PhaseCounts(*prefill))
            for prefill, decode in counts.tolist()
        )
    )
