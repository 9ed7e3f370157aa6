"""What a trace asked its cache for, in order: what replay gives to another cache."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from moe_offload.cache import kernels
from moe_offload.cache.trace import Array, EventKind, RoutingTrace
from moe_offload.errors import ConfigError

Counting = Literal["run", "token"]
_PREFILL, _DECODE = 0, 1
_REPLAYED = (EventKind.ACQUIRE, EventKind.ACQUIRE_IF_HOTTER, EventKind.NEW_SEQUENCE)


@dataclass(frozen=True, eq=False)
class ReplayEvents:
    """Steps of layers, and the places where another text begins; contiguous arrays, as the C++ library takes them.

    The experts of event i are ``expert_ids[begin[i]:begin[i + 1]]``, all different, best first.
    """

    kind: npt.NDArray[np.uint8]  # `EventKind`: ACQUIRE, ACQUIRE_IF_HOTTER or NEW_SEQUENCE
    is_prefill: npt.NDArray[np.uint8]
    layer_idx: npt.NDArray[np.int32]
    token: npt.NDArray[np.int64]  # the first of the event
    begin: npt.NDArray[np.int64]
    expert_ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float64] | None  # of each expert, as fp16 has it
    token_ids: npt.NDArray[np.int32] | None  # of each event; -1 for more than one token
    num_experts: npt.NDArray[np.int32]  # by layer

    @property
    def num_events(self) -> int:
        return len(self.kind)

    @property
    def num_layers(self) -> int:
        return len(self.num_experts)

    @property
    def always_admits(self) -> bool:
        """Whether every step evicts for all of its experts."""
        return not (self.kind == EventKind.ACQUIRE_IF_HOTTER).any()

    def native(self) -> kernels.Events:
        """As the library takes them; valid while these arrays are."""

        def address(array: npt.NDArray[Any] | None) -> int | None:
            return None if array is None else array.ctypes.data

        return kernels.Events(
            address(self.kind),
            address(self.is_prefill),
            address(self.layer_idx),
            address(self.begin),
            address(self.expert_ids),
            address(self.weights),
            address(self.token_ids),
            address(self.num_experts),
            self.num_events,
            self.num_layers,
        )

    def most_asked(self) -> npt.NDArray[np.int64]:
        """By layer, the most experts of one step that evicts for all of them: with fewer slots some are bypassed."""
        most = np.zeros(self.num_layers, np.int64)
        sizes = np.where(self.kind == EventKind.ACQUIRE, np.diff(self.begin), 0)
        np.maximum.at(most, self.layer_idx, sizes)
        return most


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
        events = _put_together(trace, num_experts, counting)
    else:
        events = None
    if events is None or not len(events.expert_ids):
        raise ConfigError("the trace names no experts: there is nothing to replay; record a run with --trace FILE")
    _check_experts(events)
    return events


def num_experts_of(trace: RoutingTrace) -> npt.NDArray[np.int32]:
    """The experts of each layer; where the trace does not tell, one more than the largest number in any layer."""
    if trace.num_experts is not None:
        return np.ascontiguousarray(trace.num_experts, np.int32)
    return np.full(trace.num_layers, int(trace.experts.max(initial=-1)) + 1, np.int32)


def as_fp16(weights: Array) -> npt.NDArray[np.float64]:
    """Rounded as traces hold them, so that every source of weights gives a policy the same numbers."""
    with np.errstate(over="ignore"):
        return weights.astype(np.float32).astype(np.float16).astype(np.float64)


def _recorded(trace: RoutingTrace, num_experts: npt.NDArray[np.int32]) -> ReplayEvents:
    def there(array: Array | None) -> Array:
        assert array is not None  # a trace has all arrays of events, or none
        return array

    size = there(trace.event_size).clip(0).astype(np.int64)
    wanted = np.isin(there(trace.event_kind), _REPLAYED)
    of_wanted = np.repeat(wanted, size)
    kind = np.ascontiguousarray(there(trace.event_kind)[wanted])
    token = there(trace.event_token)[wanted].astype(np.int64)
    weights = as_fp16(there(trace.event_weights)[of_wanted])
    is_prefill = (kind == EventKind.ACQUIRE_IF_HOTTER).astype(np.uint8)
    token_ids = None
    if trace.token_ids is not None:
        is_one = (kind == EventKind.ACQUIRE) & (token >= 0) & (token < trace.num_tokens)
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
        _offsets(size[wanted]),
        expert_ids,
        None if np.isnan(weights).any() else weights,
        token_ids,
        num_experts,
    )


# -- events put together from tokens --


@dataclass(frozen=True, eq=False)
class _Block:
    """Events one after the other: sizes, and the experts and weights of all."""

    kind: int
    is_prefill: bool
    first_token: npt.NDArray[np.int64]
    layer_idx: Array
    sizes: Array
    expert_ids: Array
    weights: Array
    is_one_token: bool


def _put_together(trace: RoutingTrace, num_experts: npt.NDArray[np.int32], counting: Counting) -> ReplayEvents:
    blocks = list(_blocks(trace, int(num_experts.max(initial=0)), counting))

    def joined(name: str, dtype: Any) -> Any:
        return np.concatenate([getattr(block, name) for block in blocks]).astype(dtype)

    def spread(values: list[Any], dtype: Any) -> Any:
        return np.repeat(np.array(values, dtype), [len(block.sizes) for block in blocks])

    token = joined("first_token", np.int64)
    token_ids = None
    if trace.token_ids is not None:
        is_one = spread([block.is_one_token for block in blocks], np.bool_)
        token_ids = np.where(is_one, trace.token_ids[token], -1).astype(np.int32)
    return ReplayEvents(
        spread([block.kind for block in blocks], np.uint8),
        spread([block.is_prefill for block in blocks], np.uint8),
        joined("layer_idx", np.int32),
        token,
        _offsets(joined("sizes", np.int64)),
        joined("expert_ids", np.int32),
        None if trace.probs is None else as_fp16(joined("weights", np.float32)),
        token_ids,
        num_experts,
    )


def _blocks(trace: RoutingTrace, num_experts: int, counting: Counting) -> Iterator[_Block]:
    num_tokens = trace.num_tokens
    nothing = np.zeros(num_tokens, np.int64)
    sequence = nothing if trace.sequence is None else trace.sequence
    phase = nothing + _DECODE if trace.phase is None else trace.phase
    if counting == "token":
        group = np.arange(num_tokens)
    elif trace.step is not None:
        group = trace.step
    else:
        group = np.where(phase == _PREFILL, -1, np.arange(num_tokens))
    experts = np.where(_repeated(trace.experts), np.int16(-1), trace.experts)
    probs = np.ones(experts.shape, np.float32) if trace.probs is None else trace.probs.astype(np.float32)

    changes = (np.diff(sequence) != 0) | (np.diff(phase) != 0)
    is_first = np.concatenate([[True], changes | (np.diff(group) != 0)])[:num_tokens]
    # Groups of one token come in long runs, which are taken at once; a run ends where the text or the phase does.
    is_one = is_first & np.concatenate([is_first[1:], [True]])[:num_tokens]
    begins_run = changes | (is_first[1:] & ~(is_one[:-1] & is_one[1:]))
    begins = np.flatnonzero(np.concatenate([[True], begins_run])[:num_tokens])
    for begin, end in zip(begins.tolist(), [*begins[1:].tolist(), num_tokens], strict=True):
        if begin == 0 or sequence[begin] != sequence[begin - 1]:
            yield _new_sequence(begin)
        is_prefill = bool(phase[begin] == _PREFILL)
        kind = EventKind.ACQUIRE_IF_HOTTER if is_prefill and counting == "run" else EventKind.ACQUIRE
        put = _one_by_one if is_one[begin] else _together
        yield put(int(kind), is_prefill, begin, experts[begin:end], probs[begin:end], num_experts)


def _new_sequence(token: int) -> _Block:
    nothing = np.zeros(0)
    return _Block(
        EventKind.NEW_SEQUENCE, False, np.array([token]), np.zeros(1), np.zeros(1), nothing, nothing, is_one_token=False
    )


def _one_by_one(kind: int, is_prefill: bool, begin: int, experts: Array, probs: Array, num_experts: int) -> _Block:
    num_tokens, num_layers, _ = experts.shape
    known = experts >= 0
    return _Block(
        kind,
        is_prefill,
        np.repeat(np.arange(begin, begin + num_tokens), num_layers),
        np.tile(np.arange(num_layers), num_tokens),
        known.sum(2).reshape(-1),
        experts[known],
        probs[known],
        is_one_token=True,
    )


def _together(kind: int, is_prefill: bool, begin: int, experts: Array, probs: Array, num_experts: int) -> _Block:
    """One event of each layer: the largest sum of weights first, of equals the lower number, as the runtime sorts."""
    num_layers = experts.shape[1]
    expert_ids, weights = [], []
    for layer_idx in range(num_layers):
        chosen, shares = experts[:, layer_idx].reshape(-1), probs[:, layer_idx].reshape(-1)
        known = chosen >= 0
        # Sums of fp16 numbers are exact in a double, in whatever order.
        sums = np.bincount(chosen[known], as_fp16(shares[known]), num_experts)
        asked = np.unique(chosen[known])
        order = asked[np.argsort(-sums[asked], kind="stable")]
        expert_ids.append(order)
        weights.append(sums[order])
    return _Block(
        kind,
        is_prefill,
        np.full(num_layers, begin),
        np.arange(num_layers),
        np.array([len(ids) for ids in expert_ids]),
        np.concatenate(expert_ids),
        np.concatenate(weights),
        is_one_token=False,
    )


def _repeated(experts: Array) -> npt.NDArray[np.bool_]:
    """Where a token names an expert that it has named before at the same layer."""
    repeated = np.zeros(experts.shape, np.bool_)
    for rank in range(1, experts.shape[2]):
        repeated[..., rank] = (experts[..., :rank] == experts[..., rank : rank + 1]).any(-1)
    return repeated


def _offsets(sizes: Array) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _check_experts(events: ReplayEvents) -> None:
    """ConfigError for what no cache would take, and what the library would use as an index."""
    if ((events.layer_idx < 0) | (events.layer_idx >= events.num_layers)).any():
        raise ConfigError(f"the trace has events of layers outside 0..{events.num_layers - 1}")
    layer_of = np.repeat(events.layer_idx, np.diff(events.begin))
    if ((events.expert_ids < 0) | (events.expert_ids >= events.num_experts[layer_of])).any():
        raise ConfigError("the trace has events with experts that their layer does not have")
