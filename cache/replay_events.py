"""What a trace asked its cache for, in order: what replay gives to another cache."""

from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from moe_offload.cache.replay_arrays import Counting, ReplayEvents, as_fp16, offsets
from moe_offload.cache.replay_tokens import put_together
from moe_offload.cache.trace import Array, EventKind, RoutingTrace
from moe_offload.errors import ConfigError

_REPLAYED = (EventKind.ACQUIRE, EventKind.ACQUIRE_IF_HOTTER, EventKind.NEW_SEQUENCE)

# One trace is replayed many times.
_made: WeakKeyDictionary[RoutingTrace, dict[Counting, ReplayEvents]] = WeakKeyDictionary()


def events_of(trace: RoutingTrace, counting: Counting = "run") -> ReplayEvents:
    """The events of a trace; ConfigError if there are none, or experts that their layer does not have.

    ``"run"``: as the runtime asked, by the trace's own record of it. Where there is no record, every decode token is
    an event of each layer, and so is every prompt (every forward pass of it, where the trace tells), which evicts only
    what is colder. ``"token"``: every token is an event and evicts for all its experts, as published figures count.
    """
    made = _made.setdefault(trace, {})
    if counting not in made:
        made[counting] = _events_of(trace, counting)
    return made[counting]


def _events_of(trace: RoutingTrace, counting: Counting) -> ReplayEvents:
    num_experts = num_experts_of(trace)
    if counting == "run" and trace.event_kind is not None:
        events = _recorded(trace, num_experts)
    elif trace.num_tokens:
        events = put_together(trace, num_experts, counting)
    else:
        events = None
    if events is None or not len(events.expert_ids):
        raise ConfigError("the trace names no experts: there is nothing to replay; record a run with --trace FILE")
    _check_experts(events)
    return events


def left_out(trace: RoutingTrace) -> tuple[EventKind, ...]:
    """What else the cache of the run was told, of which replay knows nothing: with any of it counts may differ."""
    if trace.event_kind is None or trace.event_size is None or trace.event_experts is None:
        return ()
    kind_of = np.repeat(trace.event_kind, trace.event_size.clip(0))  # an empty slot of the beginning is -1
    told = set(kind_of[trace.event_experts >= 0].tolist()) - set(_REPLAYED) - {EventKind.LOADED}
    return tuple(EventKind(kind) for kind in sorted(told))


def num_experts_of(trace: RoutingTrace) -> npt.NDArray[np.int32]:
    """The experts of each layer; where the trace does not tell, one more than the largest number in any layer."""
    if trace.num_experts is not None:
        return np.ascontiguousarray(trace.num_experts, np.int32)
    return np.full(trace.num_layers, int(trace.experts.max(initial=-1)) + 1, np.int32)


def _recorded(trace: RoutingTrace, num_experts: npt.NDArray[np.int32]) -> ReplayEvents:
    def there(array: Array | None) -> Array:
        assert array is not None  # a trace has all arrays of events, or none
        return array

    size = there(trace.event_size).clip(0).astype(np.int64)
    wanted = np.isin(there(trace.event_kind), _REPLAYED)
    of_wanted = np.repeat(wanted, size)
    kind = np.ascontiguousarray(there(trace.event_kind)[wanted])
    token = there(trace.event_token)[wanted].astype(np.int64)
    is_prefill = (kind == EventKind.ACQUIRE_IF_HOTTER).astype(np.uint8)
    step = np.arange(trace.num_tokens) if trace.step is None else trace.step
    is_known = (token >= 0) & (token < trace.num_tokens)
    prefill_tokens = np.isin(step, step[token[is_known & (is_prefill == 1)]])
    token_ids = None
    if trace.token_ids is not None:
        is_one = is_known & (np.bincount(step)[step[np.where(is_known, token, 0)]] == 1)
        token_ids = np.where(is_one, trace.token_ids[np.where(is_one, token, 0)], -1).astype(np.int32)
    expert_ids = there(trace.event_experts)[of_wanted].astype(np.int32)
    named = np.sort(np.repeat(np.arange(len(kind)), size[wanted]) << 32 | expert_ids)
    if (named[1:] == named[:-1]).any():
        raise ConfigError("the trace has events that name an expert twice")
    return ReplayEvents(
        kind,
        is_prefill,
        np.where(kind == EventKind.NEW_SEQUENCE, 0, there(trace.event_layer)[wanted]).astype(np.int32),
        token,
        offsets(size[wanted]),
        expert_ids,
        as_fp16(there(trace.event_weights)[of_wanted]),
        token_ids,
        num_experts,
        int((~prefill_tokens).sum()),
        int(prefill_tokens.sum()),
    )


def _check_experts(events: ReplayEvents) -> None:
    """ConfigError for what no cache would take, and what the library would use as an index."""
    if ((events.layer_idx < 0) | (events.layer_idx >= events.num_layers)).any():
        raise ConfigError(f"the trace has events of layers outside 0..{events.num_layers - 1}")
    layer_of = np.repeat(events.layer_idx, np.diff(events.begin))
    if ((events.expert_ids < 0) | (events.expert_ids >= events.num_experts[layer_of])).any():
        raise ConfigError("the trace has events with experts that their layer does not have")
