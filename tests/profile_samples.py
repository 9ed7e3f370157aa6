"""Profile reports to draw and to read, made by code: the analysis of traces that no model made."""

from dataclasses import replace
from functools import cache

import numpy as np
from synthetic_trace import synthetic_trace

from moe_offload.cache.trace import RoutingTrace, TransferKind
from moe_offload.offload.profiling.analyse import analyse
from moe_offload.offload.profiling.report import ProfileReport


@cache
def sample_report() -> ProfileReport:
    """A run of a small model with everything in it."""
    return analyse(synthetic_trace())


@cache
def slow_sample_report() -> ProfileReport:
    """The same with fewer slots: to compare."""
    return analyse(synthetic_trace(num_slots=3))


@cache
def long_sample_report() -> ProfileReport:
    """More steps than a chart has points."""
    return analyse(synthetic_trace(num_layers=3, prompt_tokens=(30, 10, 40, 5), new_tokens=500))


@cache
def large_sample_report() -> ProfileReport:
    """As wide as published models are: 94 layers of 128 experts."""
    return analyse(synthetic_trace(94, 128, 8, prompt_tokens=(6, 3), new_tokens=12, num_slots=48))


def gpu_sample_trace() -> RoutingTrace:
    """The same on two GPUs: what was read is copied, to the first for even layers, in a quarter of a link's time."""
    trace = synthetic_trace()
    assert trace.transfer_kind is not None
    assert trace.transfer_layer is not None
    return replace(
        trace,
        copy_device=trace.transfer_layer % 2,
        copy_begin_us=trace.transfer_begin_us,
        copy_ns=np.full(len(trace.transfer_kind), 100_000),
        copy_bytes=trace.transfer_bytes,
        copy_kind=(trace.transfer_kind != TransferKind.DEMAND).astype(np.uint8),
        link_bytes_per_s=np.array([20e9, 10e9], np.float32),
        meta=dict(trace.meta) | {"device": "cuda", "vram_bytes": 1024**3},
    )


@cache
def gpu_sample_report() -> ProfileReport:
    """A run whose misses were copied to two GPUs."""
    return analyse(gpu_sample_trace())


@cache
def bare_sample_report() -> ProfileReport:
    """What a trace of routing alone gives: no outcomes, no times, no predictions."""
    return analyse(bare(synthetic_trace(num_layers=4)), trace_file="trace.npz")


def bare(trace: RoutingTrace) -> RoutingTrace:
    """The four arrays that published traces have."""
    return RoutingTrace(trace.experts, sequence=trace.sequence, phase=trace.phase)


def without(trace: RoutingTrace, *prefixes: str) -> RoutingTrace:
    """The trace without the arrays whose names begin so."""
    return replace(trace, **{name: None for name in trace.arrays() if name.startswith(prefixes)})
