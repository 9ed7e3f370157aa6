"""A trace from its pieces: each holds some tokens, steps, transfers, copies and events, as they became known."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from moe_offload.cache.trace import LAYOUT, Array, Outcome, RoutingTrace
from moe_offload.errors import ConfigError

OF_THE_ROW = -1  # the size of an event of a piece whose experts and weights are those of its token
# The first axes along which a trace grows; everything else is said once.
_GROWING = ("tokens", "steps", "transfers", "copies", "events", "experts of events")
_ALONGSIDE = {"tokens": "experts", "steps": "step_us"}  # which array tells how many a piece has
# What stands where a piece knows less than another: a layer with fewer choices, a step without predictions.
_FILL = {"probs": 0, "outcome": int(Outcome.UNKNOWN)}


def join_blocks(blocks: Iterable[Mapping[str, Array]], meta: Mapping[str, Any]) -> RoutingTrace:
    """Concatenate along the axes that grow; pieces that know less than others are padded with "unknown".

    ``distance`` follows from ``predicted``, whose piece ``d`` of the third axis is ``d + 1`` layers ahead.
    """
    pieces = list(blocks)
    once = {name: array for piece in pieces for name, array in piece.items() if LAYOUT[name][1][0] not in _GROWING}
    arrays: dict[str, Array] = dict(once)
    for name, (dtype, axes) in LAYOUT.items():
        if axes[0] in _GROWING and any(name in piece for piece in pieces):
            arrays[name] = _joined(name, dtype, axes, pieces)
    if "experts" not in arrays:
        layers = len(arrays["num_experts"]) if "num_experts" in arrays else 0
        arrays["experts"] = np.empty((0, layers, 0), np.int16)
        for name in [name for name in arrays if LAYOUT[name][1][0] == "tokens" and name != "experts"]:
            del arrays[name]
    if "predicted" in arrays:
        arrays["distance"] = np.arange(1, arrays["predicted"].shape[2] + 1, dtype=np.int16)
    if "event_size" in arrays:
        _spell_out(arrays)
    return RoutingTrace(meta=meta, **arrays)


def _spell_out(arrays: dict[str, Array]) -> None:
    """Give every event its experts: pieces leave out those that a token's own row says."""
    size, experts, probs = arrays["event_size"], arrays["experts"], arrays.get("probs")
    told = size == OF_THE_ROW
    token, layer = arrays["event_token"][told], arrays["event_layer"][told]
    bad = (token < 0) | (token >= len(experts)) | (layer < 0) | (layer >= experts.shape[1])
    if probs is None or bad.any() or int(size.clip(0).sum(dtype=np.int64)) != len(arrays["event_experts"]):
        raise ConfigError("the events of a trace do not fit its tokens")
    rows = experts[token, layer]
    known = rows >= 0
    whole = size.astype(np.int64)
    whole[told] = known.sum(axis=1)
    is_told = np.repeat(told, whole)
    for name, stored, of_rows in (
        ("event_experts", np.int16, rows),
        ("event_weights", np.float32, probs[token, layer]),
    ):
        spelled = np.empty(len(is_told), stored)
        spelled[~is_told] = arrays[name]
        spelled[is_told] = of_rows[known]
        arrays[name] = spelled
    arrays["event_size"] = whole.astype(np.int32)


def _joined(name: str, dtype: str, axes: tuple[str, ...], pieces: list[Mapping[str, Array]]) -> Array:
    beside = _ALONGSIDE.get(axes[0], name)
    there = [piece[name] for piece in pieces if name in piece]
    if any(array.ndim != len(axes) for array in there):
        raise ConfigError(f"{name!r} of a trace is not [{', '.join(axes)}]")
    inner = tuple(max(array.shape[axis] for array in there) for axis in range(1, len(axes)))
    lengths = [len(piece[name]) if name in piece else len(piece.get(beside, ())) for piece in pieces]
    whole = np.full((sum(lengths), *inner), _FILL.get(name, 0 if np.dtype(dtype).kind == "u" else -1), dtype)
    begin = 0
    for piece, length in zip(pieces, lengths, strict=True):
        if name in piece:
            array = piece[name]
            whole[(slice(begin, begin + length), *(slice(n) for n in array.shape[1:]))] = array
        begin += length
    return whole
