"""What one layer's experts tell of the next layer's."""

from collections.abc import Sequence

import numpy as np

from moe_offload.cache.trace import Array
from moe_offload.offload.profiling.sections import Coactivation, CoactivationMap, CoactivationPair

_MAPS, _SHOWN_EXPERTS, _PAIRS, _FEWEST_TOKENS = 4, 48, 20, 20
_ROWS_AT_ONCE = 1 << 22  # numbers in a temporary


def coactivation(experts: Array, sizes: Sequence[int]) -> Coactivation | None:
    """``experts`` [tokens, layers, top_k]: tables from every layer to the next; None for one layer or few tokens."""
    if len(sizes) < 2 or len(experts) < 2:
        return None
    half = len(experts) // 2
    recall, base_recall, pairs, maps = [], [], [], []
    shown = set(np.linspace(0, len(sizes) - 2, min(_MAPS, len(sizes) - 1)).round().astype(int).tolist())
    for layer in range(len(sizes) - 1):
        now, after = experts[:, layer], experts[:, layer + 1]
        learnt = _joint(now[:half], after[:half], sizes[layer], sizes[layer + 1])
        base = np.bincount(after[:half][after[:half] >= 0], minlength=sizes[layer + 1]).astype(float)
        recall.append(_recall(now[half:], after[half:], _given(learnt, now[:half]), base))
        base_recall.append(_recall(now[half:], after[half:], np.zeros_like(learnt, dtype=float), base))
        joint = learnt + _joint(now[half:], after[half:], sizes[layer], sizes[layer + 1])
        pairs += _strongest(layer, joint, now, after)
        if layer in shown:
            maps.append(_map(layer, joint, now))
    pairs.sort(key=lambda pair: -pair.lift)
    return Coactivation(tuple(recall), tuple(base_recall), tuple(pairs[:_PAIRS]), tuple(maps))


def _joint(now: Array, after: Array, size: int, next_size: int) -> Array:
    """How many tokens chose expert i of the layer and j of the next: ``[i, j]``."""
    counts = np.zeros(size * next_size, np.int64)
    rows = max(1, _ROWS_AT_ONCE // max(1, now.shape[1] * after.shape[1]))
    for begin in range(0, len(now), rows):
        i, j = now[begin : begin + rows, :, None], after[begin : begin + rows, None, :]
        pair = i.astype(np.int64) * next_size + j
        counts += np.bincount(pair[(i >= 0) & (j >= 0)], minlength=size * next_size)
    return counts.reshape(size, next_size)


def _given(joint: Array, now: Array) -> Array:
    """P(j in the next layer | i in this one)."""
    uses = np.bincount(now[now >= 0], minlength=len(joint))
    given: Array = joint / np.maximum(1, uses)[:, None]
    return given


def _recall(now: Array, after: Array, given: Array, base: Array) -> float | None:
    """Share of ``after`` among as many experts with the highest sum of ``given`` over ``now``; ``base`` breaks ties."""
    asked = int((after >= 0).sum())
    if not asked:
        return None
    table = np.vstack([given, np.zeros_like(given[:1])])  # -1 looks up nothing
    tie = base / (base.sum() + 1) * 1e-3
    found, top_k = 0, after.shape[1]
    rows = max(1, _ROWS_AT_ONCE // (now.shape[1] * given.shape[1]))
    for begin in range(0, len(now), rows):
        scores = table[now[begin : begin + rows]].sum(axis=1) + tie  # [rows, next experts]
        guess = np.argpartition(-scores, min(top_k, scores.shape[1]) - 1, axis=1)[:, :top_k]
        found += int((after[begin : begin + rows, :, None] == guess[:, None, :]).sum())
    return found / asked


def _strongest(layer: int, joint: Array, now: Array, after: Array) -> list[CoactivationPair]:
    """The pairs of a layer that are chosen together far more often than chance has it, and not just a few times."""
    uses = np.bincount(now[now >= 0], minlength=joint.shape[0])
    next_uses = np.bincount(after[after >= 0], minlength=joint.shape[1])
    expected = uses[:, None] * (next_uses / len(now))
    lift = np.where(joint >= _FEWEST_TOKENS, joint / np.maximum(expected, 1e-9), 0.0)
    best = np.argsort(-lift, axis=None)[:_PAIRS]
    return [
        CoactivationPair(layer, int(i), int(j), int(joint[i, j]), float(lift[i, j]))
        for i, j in zip(*np.unravel_index(best, lift.shape), strict=True)
        if lift[i, j] > 1
    ]


def _map(layer: int, joint: Array, now: Array) -> CoactivationMap:
    rows, columns = _busiest(joint.sum(axis=1)), _busiest(joint.sum(axis=0))
    given = _given(joint, now)[np.ix_(rows, columns)].round(4)
    return CoactivationMap(
        layer, layer + 1, tuple(rows.tolist()), tuple(columns.tolist()), tuple(tuple(row) for row in given.tolist())
    )


def _busiest(counts: Array) -> Array:
    return np.sort(np.argsort(-counts, kind="stable")[:_SHOWN_EXPERTS])
