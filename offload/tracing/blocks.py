"""Notes to arrays: a block of a trace from passes, events of the cache, transfers and copies."""

from collections.abc import Sequence

import numpy as np
import torch

from moe_offload.cache import Outcome
from moe_offload.cache.trace import LAYER_TIMES, Array
from moe_offload.cache.trace_blocks import OF_THE_ROW
from moe_offload.offload.tracing.copies import CopyNote
from moe_offload.offload.tracing.passes import FINISHED, EventNote, LayerNote, PassNote
from moe_offload.offload.tracing.transfers import TransferNote

# Plain numbers: members of an enumeration are slow to make arrays of.
_RESIDENT, _PREFETCHED, _LATE, _MISSED, _BYPASSED = (int(outcome) for outcome in list(Outcome)[:5])
_LONGEST_NS = np.iinfo(np.uint32).max


class BlockMaker:
    """For one model; times are counted from ``begin_ns`` of ``perf_counter_ns``."""

    def __init__(self, num_experts: Sequence[int], begin_ns: int) -> None:
        self._num_experts = list(num_experts)
        self._begin_ns = begin_ns

    def block(
        self, passes: Sequence[PassNote], events: Sequence[EventNote], transfers: Sequence[TransferNote]
    ) -> dict[str, Array]:
        """Arrays by their names in a trace; empty where there is nothing new."""
        arrays: dict[str, Array] = {}
        if passes:
            with np.errstate(over="ignore"):  # weights beyond fp16 become inf
                arrays |= self._tokens(passes)
            arrays |= self._steps(passes)
        if events:
            arrays |= _events(events)
        if transfers:
            arrays |= self._transfers(transfers)
        return arrays

    def _us(self, time_ns: int) -> int:
        return (time_ns - self._begin_ns) // 1000

    # T tokens, L layers, K choices

    def _tokens(self, passes: Sequence[PassNote]) -> dict[str, Array]:
        num_layers = len(self._num_experts)
        num_tokens = sum(note.num_tokens for note in passes)
        widths = [_width(layer) for note in passes for layer, _ in _first_row_of(note)]
        shape = (num_tokens, num_layers, max(widths, default=0))
        arrays: dict[str, Array] = {
            "experts": np.full(shape, -1, np.int16),
            "probs": np.zeros(shape, np.float16),
            "outcome": np.full(shape, Outcome.UNKNOWN, np.uint8),
        }
        begin = 0
        singles: list[tuple[LayerNote, int]] = []
        for note in passes:
            for layer, row in _first_row_of(note):
                if layer.num_rows == 1:
                    singles.append((layer, begin + row))
                else:
                    self._fill(layer, arrays, begin + row)
            begin += note.num_tokens
        _fill_singles(singles, arrays)
        counts = [note.num_tokens for note in passes]
        arrays["sequence"] = np.concatenate([_sequences(note) for note in passes])
        arrays["phase"] = np.repeat([0 if note.is_prompt else 1 for note in passes], counts).astype(np.uint8)
        arrays["step"] = np.repeat([note.step for note in passes], counts).astype(np.int32)
        if any(note.predictions for note in passes):
            arrays["predicted"] = self._predicted(passes, num_tokens)
        if any(note.token_ids is not None for note in passes):
            arrays["token_ids"] = np.concatenate([_token_ids(note) for note in passes])
        return arrays

    def _fill(self, layer: LayerNote, arrays: dict[str, Array], first: int) -> None:
        """Several rows of a layer, from the row ``first`` on."""
        assert layer.index is not None, "several rows have an index"
        layer_idx, outcomes = layer.layer_idx, _outcomes(layer)
        index, last = layer.index.cpu().numpy(), first + layer.num_rows
        num_experts, top_k = self._num_experts[layer_idx], index.shape[1]
        known = (index >= 0) & (index < num_experts)
        table = np.full(num_experts, Outcome.UNKNOWN, np.uint8)
        table[list(outcomes)] = list(outcomes.values())
        arrays["experts"][first:last, layer_idx, :top_k] = np.where(known, index, -1)
        arrays["outcome"][first:last, layer_idx, :top_k] = np.where(
            known, table[np.where(known, index, 0)], np.uint8(Outcome.UNKNOWN)
        )
        if layer.weights is not None:
            weights = layer.weights.detach().float().cpu().numpy()
            arrays["probs"][first:last, layer_idx, :top_k] = np.where(known, weights, 0)

    def _predicted(self, passes: Sequence[PassNote], num_tokens: int) -> Array:
        predictions = [prediction for note in passes for prediction in note.predictions]
        distances = max(distance for _, distance, _, _ in predictions)
        most = max(index.shape[-1] for _, _, _, index in predictions)
        predicted = np.full((num_tokens, len(self._num_experts), distances, most), -1, np.int16)
        begin = 0
        for note in passes:
            for target_idx, distance, ids, index in note.predictions:
                if note.num_tokens == 1:
                    predicted[begin, target_idx, distance - 1, : len(ids)] = ids
                elif index.reshape(-1, index.shape[-1]).shape[0] == note.num_tokens:
                    rows = index.reshape(note.num_tokens, -1).cpu().numpy()
                    known = (rows >= 0) & (rows < self._num_experts[target_idx])
                    predicted[begin : begin + note.num_tokens, target_idx, distance - 1, : rows.shape[1]] = np.where(
                        known, rows, -1
                    )
            begin += note.num_tokens
        return predicted

    def _steps(self, passes: Sequence[PassNote]) -> dict[str, Array]:
        begin = [self._us(note.step_begin_ns) for note in passes]
        return {
            "step_begin_us": np.array(begin, np.int64),
            "step_us": np.array([self._us(n.step_end_ns) - b for n, b in zip(passes, begin, strict=True)], np.uint32),
            "step_tokens": np.array([note.num_tokens for note in passes], np.int32),
            "layer_us": self._layer_times(passes),
        }

    def _layer_times(self, passes: Sequence[PassNote]) -> Array:
        """[steps, L, 4] microseconds; of a step they add up to the time until the pass's last experts."""
        times = np.zeros((len(passes), len(self._num_experts), len(LAYER_TIMES)), np.int64)
        noted = [
            (row, n.layer_idx, n.before_ns, n.router_ns or n.begin_ns, n.begin_ns, n.end_ns, n.wait_ns, n.ahead_ns)
            for row, note in enumerate(passes)
            for n in note.layers
        ]
        if not noted:
            return times.astype(np.uint32)
        row, layer, *moments, wait, ahead = np.array(noted, np.int64).T
        before, router, begin, end = ((moment - self._begin_ns) // 1000 for moment in moments)
        router = router.clip(before, begin)  # a model may ask its routers at any time
        wait = np.minimum(wait // 1000, end - begin)
        ahead = np.minimum(ahead // 1000, end - begin - wait)
        parts = [router - before, begin - router + ahead, wait, end - begin - wait - ahead]
        np.add.at(times, (row, layer), np.stack(parts, axis=1))
        return times.astype(np.uint32)

    def _transfers(self, transfers: Sequence[TransferNote]) -> dict[str, Array]:
        return {
            "transfer_layer": np.array([note.key[0] for note in transfers], np.int16),
            "transfer_expert": np.array([note.key[1] for note in transfers], np.int16),
            "transfer_begin_us": np.array([self._us(note.begin_ns) for note in transfers], np.int64),
            "transfer_end_us": np.array([self._us(note.end_ns) for note in transfers], np.int64),
            "transfer_bytes": np.array([note.num_bytes for note in transfers], np.uint32),
            "transfer_kind": np.array([note.kind for note in transfers], np.uint8),
        }

    def copies(self, copies: Sequence[CopyNote]) -> dict[str, Array]:
        """Likewise of copies to devices."""
        if not copies:
            return {}
        return {
            "copy_device": np.array([note.device for note in copies], np.uint8),
            "copy_begin_us": np.array([self._us(note.begin_ns) for note in copies], np.int64),
            "copy_ns": np.array([note.took_ns for note in copies], np.int64).clip(0, _LONGEST_NS).astype(np.uint32),
            "copy_bytes": np.array([note.num_bytes for note in copies], np.uint32),
            "copy_kind": np.array([note.kind for note in copies], np.uint8),
        }


def _fill_singles(singles: Sequence[tuple[LayerNote, int]], arrays: dict[str, Array]) -> None:
    """Layers with one row, all at once: decode steps are made of them, and each call of numpy's costs a microsecond."""
    rows, layers, sizes = [], [], []
    ids: list[int] = []
    weights: list[float] = []
    found: list[int] = []
    for layer, row in singles:
        own = layer.expert_ids
        rows.append(row)
        layers.append(layer.layer_idx)
        sizes.append(len(own))
        ids += own
        weights += layer.weights_given or [0.0] * len(own)
        outcomes = _outcomes(layer)
        found += [outcomes[expert_idx] for expert_idx in own]
    if not ids:
        return
    ends = np.cumsum(sizes, dtype=np.int64)
    rank = np.arange(len(ids)) - np.repeat(ends - sizes, sizes)
    where = np.repeat(rows, sizes), np.repeat(layers, sizes), rank
    arrays["experts"][where] = ids
    arrays["probs"][where] = np.array(weights, np.float32)
    arrays["outcome"][where] = found


def _width(layer: LayerNote) -> int:
    return len(layer.expert_ids) if layer.index is None else layer.index.shape[1]


def _first_row_of(note: PassNote) -> list[tuple[LayerNote, int]]:
    """Each piece of a layer, and the row of the pass that it begins with."""
    rows: dict[int, int] = {}
    placed = []
    for layer in note.layers:
        row = rows.get(layer.layer_idx, 0)
        # A family that does not say its choices by tokens says them where there is one token.
        if layer.index is not None or note.num_tokens == 1:
            placed.append((layer, row))
        rows[layer.layer_idx] = row + layer.num_rows
    return placed


def _outcomes(layer: LayerNote) -> dict[int, int]:
    """Expert -> what the step found of it."""
    found: dict[int, int] = {}
    for hits, misses, bypassed, prefetched in layer.leases:
        for expert_idx, _, _, loading in hits:
            found[expert_idx] = _LATE if loading else _RESIDENT
        for expert_idx in prefetched:
            if found[expert_idx] == _RESIDENT:
                found[expert_idx] = _PREFETCHED
        for expert_idx, _, _, _ in misses:
            found[expert_idx] = _MISSED
        for expert_idx in bypassed:
            found[expert_idx] = _BYPASSED
    for expert_idx, arrived in layer.guesses:
        found[expert_idx] = _PREFETCHED if arrived else _LATE
    return found


def _sequences(note: PassNote) -> Array:
    """One number for each token: the rows of a batch come one sequence after the other."""
    per_sequence, rest = divmod(note.num_tokens, note.num_sequences)
    if rest:
        return np.full(note.num_tokens, note.sequence, np.int32)
    return np.repeat(np.arange(note.sequence, note.sequence + note.num_sequences), per_sequence).astype(np.int32)


def _token_ids(note: PassNote) -> Array:
    if isinstance(note.token_ids, torch.Tensor) and note.token_ids.numel() == note.num_tokens:
        return note.token_ids.reshape(-1).cpu().numpy().astype(np.int32)
    return np.full(note.num_tokens, -1, np.int32)


def _events(events: Sequence[EventNote]) -> dict[str, Array]:
    of_the_row = [_is_of_the_row(event) for event in events]
    named = [event for event, is_said in zip(events, of_the_row, strict=True) if not is_said]
    experts = [expert_idx for event in named for expert_idx in event.expert_ids]
    weights = [
        weight
        for event in named
        for weight in (event.weights if event.weights is not None else [np.nan] * len(event.expert_ids))
    ]
    sizes = [
        OF_THE_ROW if is_said else len(event.expert_ids) for event, is_said in zip(events, of_the_row, strict=True)
    ]
    tokens = [e.owner.first_token if e.owner is not None and e.owner.state == FINISHED else -1 for e in events]
    return {
        "event_kind": np.array([event.kind for event in events], np.uint8),
        "event_layer": np.array([event.layer_idx for event in events], np.int16),
        "event_token": np.array(tokens, np.int32),
        "event_size": np.array(sizes, np.int32),
        "event_experts": np.array(experts, np.int16),
        "event_weights": np.array(weights, np.float32),
    }


def _is_of_the_row(event: EventNote) -> bool:
    """Whether the token's own row in the trace says the same."""
    owner, layer = event.owner, event.layer
    return (
        owner is not None
        and owner.state == FINISHED
        and owner.num_tokens == 1
        and layer is not None
        and layer.expert_ids is event.expert_ids
        and len(layer.leases) == 1
        and event.weights is not None
        and owner.has_each_layer_once
    )
