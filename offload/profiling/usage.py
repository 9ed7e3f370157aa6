"""Heat maps of layers and experts: who was used, who hit."""

from collections.abc import Sequence

import numpy as np

from moe_offload.cache.trace import Array, RoutingTrace
from moe_offload.offload.profiling.requests import DECODE, Requests, Steps, num_experts, phases
from moe_offload.offload.profiling.residency_frames import residency_frames
from moe_offload.offload.profiling.sections import Integers, Usage


def usage(trace: RoutingTrace, steps: Steps, requests: Requests) -> Usage:
    """What each expert of each layer was asked for."""
    sizes = num_experts(trace)
    is_decode = phases(trace) == DECODE
    asked = requests.only(requests.is_decode)
    hits = asked.is_hit
    return Usage(
        prefill_uses=_rows(expert_uses(trace.experts[~is_decode], sizes)),
        decode_uses=_rows(expert_uses(trace.experts[is_decode], sizes)),
        requests=_rows(_counts(asked, sizes)),
        hits=None if hits is None else _rows(_counts(asked.only(hits), sizes)),
        residency=residency_frames(trace, steps, requests),
    )


def expert_uses(experts: Array, sizes: Sequence[int]) -> list[Array]:
    """``experts`` [tokens, layers, top_k] -> for each layer, how many tokens chose each of its experts."""
    return [
        np.bincount((column := experts[:, layer]).ravel()[column.ravel() >= 0], minlength=size)
        for layer, size in enumerate(sizes)
    ]


def _counts(requests: Requests, sizes: Sequence[int]) -> list[Array]:
    width = max(sizes)
    counts = np.bincount(requests.layer * width + requests.expert, minlength=width * len(sizes))
    return [counts[layer * width : layer * width + size] for layer, size in enumerate(sizes)]


def _rows(counts: list[Array]) -> tuple[Integers, ...]:
    return tuple(tuple(row.tolist()) for row in counts)
