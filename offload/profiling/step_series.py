"""The run step by step, for the strip of tokens and the chart of times."""

import numpy as np

from moe_offload.cache.trace import LAYER_TIMES, Array, RoutingTrace
from moe_offload.offload.profiling.link import copied_by_step
from moe_offload.offload.profiling.requests import Requests, Steps
from moe_offload.offload.profiling.sections import Floats, Integers, StepSeries

_MOST_POINTS = 1500


def step_series(trace: RoutingTrace, steps: Steps, requests: Requests) -> StepSeries:
    """Every step, or sums of neighbouring steps where there are more than a chart can show."""
    per_point = max(1, -(-len(steps) // _MOST_POINTS))
    first = _first_steps(steps, per_point)
    hits, late = requests.is_hit, requests.is_late

    def count(mask: Array | None) -> Integers:
        chosen = requests.step if mask is None else requests.step[mask]
        return _sums(np.bincount(chosen, minlength=len(steps)), first)

    times: dict[str, Floats] | None = None
    if trace.step_us is not None:
        times = {f"{name}_s": _seconds(part, first) for name, part in step_times(trace).items()}
        times["wall_s"] = _seconds(trace.step_us, first)
    copied = copied_by_step(trace)
    return StepSeries(
        steps_per_point=per_point,
        first_step=tuple(first.tolist()),
        num_steps=_sums(np.ones(len(steps), np.int64), first),
        num_tokens=_sums(steps.num_tokens, first),
        sequence=tuple(steps.sequence[first].tolist()),
        phase=tuple("decode" if decode else "prefill" for decode in steps.is_decode[first].tolist()),
        requests=count(None),
        hits=None if hits is None else count(hits),
        late=None if late is None else count(late),
        misses=None if hits is None else count(~hits),
        **{f"{name}_s": None if times is None else times.get(f"{name}_s") for name in ("wall", *LAYER_TIMES, "other")},
        copied_demand_bytes=None if copied is None else _sums(copied["demand_bytes"], first),
        copied_ahead_bytes=None if copied is None else _sums(copied["ahead_bytes"], first),
        link_busy_s=None if copied is None else tuple(ns / 1e9 for ns in _sums(copied["busy_ns"], first)),
    )


def step_times(trace: RoutingTrace) -> dict[str, Array]:
    """Microseconds [S] of dense, router, wait and experts, layers added up, and of what remains of the step."""
    if trace.layer_us is None or trace.step_us is None:
        return {}
    inside = trace.layer_us.sum(axis=1, dtype=np.int64)  # [S, four times]
    parts = {name: inside[:, index] for index, name in enumerate(LAYER_TIMES)}
    return parts | {"other": trace.step_us.astype(np.int64) - inside.sum(axis=1)}


def _first_steps(steps: Steps, per_point: int) -> Array:
    """The first step of every point: a new one after so many, and where phase or sequence change."""
    if not len(steps):
        return np.zeros(0, np.int64)
    changes = np.ones(len(steps), bool)
    changes[1:] = (steps.is_decode[1:] != steps.is_decode[:-1]) | (steps.sequence[1:] != steps.sequence[:-1])
    number = np.arange(len(steps))
    since = number - np.maximum.accumulate(np.where(changes, number, 0))
    return np.flatnonzero(since % per_point == 0)


def _sums(values: Array, first: Array) -> Integers:
    return tuple(np.add.reduceat(values.astype(np.int64), first).tolist()) if len(first) else ()


def _seconds(microseconds: Array, first: Array) -> Floats:
    return tuple(total / 1e6 for total in _sums(microseconds, first))
