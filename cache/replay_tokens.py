"""Events put together from what a trace says of its tokens, as the runtime would have asked."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_offload.cache.replay_arrays import Counting, ReplayEvents, as_fp16, offsets
from moe_offload.cache.trace import Array, EventKind, RoutingTrace

_PREFILL, _DECODE = 0, 1


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


def put_together(trace: RoutingTrace, num_experts: npt.NDArray[np.int32], counting: Counting) -> ReplayEvents:
    """The events of a trace that has tokens; see `moe_offload.cache.replay_events.events_of`."""
    blocks = list(_blocks(trace, int(num_experts.max(initial=0)), counting))

    def joined(name: str, dtype: Any) -> Any:
        return np.concatenate([getattr(block, name) for block in blocks]).astype(dtype, copy=False)

    def spread(values: list[Any], dtype: Any) -> Any:
        return np.repeat(np.array(values, dtype), [len(block.sizes) for block in blocks])

    token, weights = joined("first_token", np.int64), joined("weights", np.float32)
    num_prefill = 0 if trace.phase is None else int((trace.phase == _PREFILL).sum())
    token_ids = None
    if trace.token_ids is not None:
        is_one = spread([block.is_one_token for block in blocks], np.bool_)
        token_ids = np.where(is_one, trace.token_ids[token], -1).astype(np.int32)
    return ReplayEvents(
        spread([block.kind for block in blocks], np.uint8),
        spread([block.is_prefill for block in blocks], np.uint8),
        joined("layer_idx", np.int32),
        token,
        offsets(joined("sizes", np.int64)),
        joined("expert_ids", np.int32),
        None if np.isnan(weights).all() else as_fp16(weights),
        token_ids,
        num_experts,
        trace.num_tokens - num_prefill,
        num_prefill,
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
    repeated = _repeated(trace.experts)
    experts = np.where(repeated, np.int16(-1), trace.experts) if repeated.any() else trace.experts
    # Without weights, tokens together count by how many ask for an expert, and a token alone not at all.
    probs = np.broadcast_to(np.float16(1), experts.shape) if trace.probs is None else trace.probs
    probs_alone = np.broadcast_to(np.float16(np.nan), experts.shape) if trace.probs is None else trace.probs

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
        put, shares = (_one_by_one, probs_alone) if is_one[begin] else (_together, probs)
        yield put(int(kind), is_prefill, begin, experts[begin:end], shares[begin:end], num_experts)


def _new_sequence(token: int) -> _Block:
    return _Block(
        EventKind.NEW_SEQUENCE,
        is_prefill=False,
        first_token=np.array([token]),
        layer_idx=np.zeros(1, np.int32),
        sizes=np.zeros(1, np.int64),
        expert_ids=np.zeros(0, np.int16),
        weights=np.zeros(0, np.float16),
        is_one_token=False,
    )


def _one_by_one(kind: int, is_prefill: bool, begin: int, experts: Array, probs: Array, num_experts: int) -> _Block:
    num_tokens, num_layers, top_k = experts.shape
    known = experts >= 0
    all_known = bool(known.all())
    return _Block(
        kind,
        is_prefill,
        np.repeat(np.arange(begin, begin + num_tokens), num_layers),
        np.tile(np.arange(num_layers, dtype=np.int32), num_tokens),
        np.full(num_tokens * num_layers, top_k) if all_known else known.sum(2).reshape(-1),
        experts.reshape(-1) if all_known else experts[known],
        probs.reshape(-1) if all_known else probs[known],
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
    by_rank = np.ascontiguousarray(np.moveaxis(experts, 2, 0))
    repeated = np.zeros(by_rank.shape, np.bool_)
    for rank in range(1, len(by_rank)):
        for earlier in range(rank):
            repeated[rank] |= by_rank[earlier] == by_rank[rank]
    return np.moveaxis(repeated, 0, 2)
