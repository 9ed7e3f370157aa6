"""The layers one by one, and which of them starve."""

import numpy as np

from moe_offload.cache.trace import LAYER_TIMES, Array, RoutingTrace
from moe_offload.offload.profiling.requests import Requests, Steps, num_experts
from moe_offload.offload.profiling.sections import LayerFigures

_STARVING_TIMES_MEAN = 1.5
_STARVING_STANDARD_ERRORS = 3


def layer_figures(trace: RoutingTrace, steps: Steps, requests: Requests) -> tuple[LayerFigures, ...]:
    """Counts and times of every layer."""
    sizes, num_layers = num_experts(trace), trace.num_layers
    asked, read = requests.only(requests.is_decode), requests.only(~requests.is_decode)
    num_asked, num_read = _by_layer(asked, num_layers), _by_layer(read, num_layers)
    times = None
    if trace.layer_us is not None:
        times = trace.layer_us[steps.is_decode].sum(axis=0, dtype=np.int64) / 1e6  # [layers, four times]
    hits = late = prefill_hits = starving = None
    if asked.is_hit is not None and asked.is_late is not None and read.is_hit is not None:
        hits, late = _by_layer(asked.only(asked.is_hit), num_layers), _by_layer(asked.only(asked.is_late), num_layers)
        prefill_hits = _by_layer(read.only(read.is_hit), num_layers)
        starving = _starving(num_asked, hits)
    num_misses = None if hits is None else num_asked - hits
    return tuple(
        LayerFigures(
            layer=layer,
            experts=sizes[layer],
            slots=None if trace.num_slots is None else int(trace.num_slots[layer]),
            requests=int(num_asked[layer]),
            hits=None if hits is None else int(hits[layer]),
            late=None if late is None else int(late[layer]),
            misses=None if num_misses is None else int(num_misses[layer]),
            hit_ratio=_ratio(hits, num_asked, layer),
            hit_ratio_prefill=_ratio(prefill_hits, num_read, layer),
            miss_share=None if num_misses is None else _ratio(num_misses, np.full(num_layers, num_misses.sum()), layer),
            **{f"{name}_s": None if times is None else float(times[layer, i]) for i, name in enumerate(LAYER_TIMES)},
            starving=False if starving is None else bool(starving[layer]),
        )
        for layer in range(num_layers)
    )


def _starving(requests: Array, hits: Array) -> Array:
    """Whose misses are far above the mean, and not by chance: by the standard error of a share."""
    misses = requests - hits
    overall = hits.sum() / max(1, requests.sum())
    error = np.sqrt(overall * (1 - overall) / np.maximum(1, requests))
    ratio = hits / np.maximum(1, requests)
    starving: Array = (misses > _STARVING_TIMES_MEAN * misses.mean()) & (
        ratio < overall - _STARVING_STANDARD_ERRORS * error
    )
    return starving


def _by_layer(requests: Requests, num_layers: int) -> Array:
    return np.bincount(requests.layer, minlength=num_layers)


def _ratio(part: Array | None, whole: Array, layer: int) -> float | None:
    return None if part is None or not whole[layer] else float(part[layer] / whole[layer])
