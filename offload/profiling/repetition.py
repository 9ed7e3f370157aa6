"""How often consecutive tokens choose the same experts, beside what was published."""

import math
from collections.abc import Sequence

import numpy as np

from moe_offload.cache.trace import Array, RoutingTrace
from moe_offload.offload.profiling.requests import DECODE, phases, sequences
from moe_offload.offload.profiling.sections import PublishedRepetition, Repetition

_MIXTRAL = "Mixtral of Experts (Jiang et al. 2024, arXiv 2401.04088), Table 5"
# Layer; first choice lowest and highest; first or second choice lowest and highest over the kinds of text.
PUBLISHED = tuple(
    PublishedRepetition("Mixtral-8x7B", _MIXTRAL, *row)
    for row in (
        (0, 0.136, 0.149, 0.449, 0.499),
        (15, 0.236, 0.284, 0.616, 0.670),
        (31, 0.197, 0.263, 0.445, 0.536),
    )
)


def repetition(trace: RoutingTrace, sizes: Sequence[int]) -> Repetition | None:
    """Of neighbouring tokens of one sequence; those of decode, unless there are none; None without any."""
    phase, sequence = phases(trace), sequences(trace)
    for wanted in (phase == DECODE, phase != DECODE):
        pairs = np.flatnonzero(wanted[1:] & wanted[:-1] & (sequence[1:] == sequence[:-1]))
        if len(pairs):
            break
    else:
        return None
    first, any_, share, top_k = [], [], [], []
    for layer in range(trace.num_layers):
        now, after = trace.experts[pairs, layer], trace.experts[pairs + 1, layer]
        known = (now >= 0).any(axis=1) & (after >= 0).any(axis=1)
        now, after = now[known], after[known]
        top_k.append(int((now >= 0).sum(axis=1).max(initial=0)))
        repeats = ((after[:, :, None] == now[:, None, :]) & (after[:, :, None] >= 0)).any(axis=2)
        first.append(_mean(now[:, 0] == after[:, 0]))
        any_.append(_mean(repeats.any(axis=1)))
        share.append(float(repeats.sum() / (after >= 0).sum()) if len(after) else None)
    return Repetition(
        first=tuple(first),
        any=tuple(any_),
        share=tuple(share),
        random_first=tuple(1 / size for size in sizes),
        random_any=tuple(1 - math.comb(size - k, k) / math.comb(size, k) for size, k in zip(sizes, top_k, strict=True)),
        random_share=tuple(k / size for size, k in zip(sizes, top_k, strict=True)),
    )


def _mean(values: Array) -> float | None:
    return float(values.mean()) if len(values) else None
