"""Where the wall clock went."""

import numpy as np

from moe_offload.cache.trace import LAYER_TIMES, Array, RoutingTrace
from moe_offload.offload.profiling.requests import Steps
from moe_offload.offload.profiling.sections import TimeSplit, Timing
from moe_offload.offload.profiling.step_series import step_times


def timing(trace: RoutingTrace, steps: Steps) -> Timing | None:
    """The split of both phases; None for a trace without times."""
    if trace.step_us is None or trace.layer_us is None:
        return None
    decode_us = trace.step_us[steps.is_decode]
    p10, p50, p90, p99 = np.percentile(decode_us / 1e6, (10, 50, 90, 99)).tolist() if len(decode_us) else [None] * 4
    return Timing(
        decode=_split(trace, steps, steps.is_decode),
        prefill=_split(trace, steps, ~steps.is_decode),
        step_p10_s=p10,
        step_p50_s=p50,
        step_p90_s=p90,
        step_p99_s=p99,
    )


def _split(trace: RoutingTrace, steps: Steps, chosen: Array) -> TimeSplit | None:
    clock_s = _clock_s(trace, steps, chosen)
    if not clock_s:
        return None
    parts = {f"{name}_s": float(part[chosen].sum()) / 1e6 for name, part in step_times(trace).items()}
    assert set(parts) == {f"{name}_s" for name in (*LAYER_TIMES, "other")}
    return TimeSplit(
        steps=int(chosen.sum()),
        tokens=int(steps.num_tokens[chosen].sum()),
        clock_s=clock_s,
        **parts,
        accounted_share=sum(parts.values()) / clock_s,
    )


def _clock_s(trace: RoutingTrace, steps: Steps, chosen: Array) -> float:
    """By the clock, not by adding steps up: from the first begin to the last end of each run of chosen steps."""
    assert trace.step_begin_us is not None
    assert trace.step_us is not None
    number = np.flatnonzero(chosen)
    if not len(number):
        return 0.0
    breaks = (np.diff(number) > 1) | (np.diff(steps.sequence[number]) != 0)
    first, last = number[np.append(True, breaks)], number[np.append(breaks, True)]
    ends_us = trace.step_begin_us[last] + trace.step_us[last].astype(np.int64)
    return float((ends_us - trace.step_begin_us[first]).sum()) / 1e6
