"""What the links to the GPUs carried: of each phase, of each GPU, and of each step."""

import numpy as np

from moe_offload.cache.trace import Array, CopyKind, RoutingTrace
from moe_offload.offload.profiling.requests import Steps
from moe_offload.offload.profiling.run_facts import Rates
from moe_offload.offload.profiling.sections import GpuLink, Link, LinkPhase

_MOST_GPUS = 256  # that a trace can tell apart


def link(trace: RoutingTrace, steps: Steps, rates: Rates) -> Link | None:
    """None for a trace without copies; ``rates`` may know of a link that was faster when nothing else ran."""
    if trace.copy_device is None or trace.copy_bytes is None or trace.copy_ns is None or trace.step_us is None:
        return None
    gpus = tuple(_gpu(trace, device, rates) for device in range(_num_gpus(trace)))
    peaks = [gpu.peak_bytes_per_s for gpu in gpus]
    known = [peak for peak in peaks if peak is not None]
    peak = sum(known) if known and len(known) == len(peaks) else None
    decode_use = _use(trace, peak, steps.is_decode)
    p10, p50, p90 = [None] * 3 if decode_use is None else np.percentile(decode_use, (10, 50, 90)).tolist()
    return Link(
        peak_bytes_per_s=peak,
        gpus=gpus,
        decode=_phase(trace, peak, steps.is_decode, len(gpus)),
        prefill=_phase(trace, peak, ~steps.is_decode, len(gpus)),
        step_use_p10=p10,
        step_use_p50=p50,
        step_use_p90=p90,
    )


def copied_by_step(trace: RoutingTrace) -> dict[str, Array] | None:
    """Of each step ``[S]`` the bytes that it sent to GPUs, by kind, and nanoseconds that links were busy with them.

    A copy is of the step that had begun last when it was enqueued. None for a trace without copies or steps.
    """
    if trace.copy_begin_us is None or trace.step_begin_us is None:
        return None
    assert trace.copy_bytes is not None
    assert trace.copy_ns is not None
    assert trace.copy_kind is not None
    step = trace.step_at(trace.copy_begin_us)
    found = {}
    for name, values, kinds in (
        ("demand_bytes", trace.copy_bytes, (CopyKind.DEMAND,)),
        ("ahead_bytes", trace.copy_bytes, (CopyKind.AHEAD,)),
        ("busy_ns", trace.copy_ns, tuple(CopyKind)),
    ):
        mine = (step >= 0) & np.isin(trace.copy_kind, kinds)
        found[name] = np.zeros(len(trace.step_begin_us), np.int64)
        np.add.at(found[name], step[mine], values[mine].astype(np.int64))
    return found


def _num_gpus(trace: RoutingTrace) -> int:
    assert trace.copy_device is not None
    named = 0 if trace.link_bytes_per_s is None else min(len(trace.link_bytes_per_s), _MOST_GPUS)
    return max(named, int(trace.copy_device.max(initial=0)) + 1)


def _gpu(trace: RoutingTrace, device: int, rates: Rates) -> GpuLink:
    assert trace.copy_device is not None
    assert trace.copy_bytes is not None
    assert trace.copy_ns is not None
    assert trace.copy_kind is not None
    mine = trace.copy_device == device
    seen = float(trace.link_bytes_per_s[device]) if trace.link_bytes_per_s is not None else 0.0
    fastest = max(seen if np.isfinite(seen) else 0.0, rates.pcie_bytes_per_s or 0.0)

    def num_bytes(kind: CopyKind) -> int:
        assert trace.copy_bytes is not None
        return int(trace.copy_bytes[mine & (trace.copy_kind == kind)].sum(dtype=np.int64))

    return GpuLink(
        gpu=device,
        demand_bytes=num_bytes(CopyKind.DEMAND),
        ahead_bytes=num_bytes(CopyKind.AHEAD),
        busy_s=float(trace.copy_ns[mine].sum(dtype=np.int64)) / 1e9,
        peak_bytes_per_s=fastest or None,
    )


def _phase(trace: RoutingTrace, peak_bytes_per_s: float | None, chosen: Array, num_links: int) -> LinkPhase | None:
    copied = copied_by_step(trace)
    if copied is None or not chosen.any():
        return None
    assert trace.step_us is not None
    wall_s = float(trace.step_us[chosen].sum(dtype=np.int64)) / 1e6
    demand_bytes, ahead_bytes, busy_ns = (int(copied[name][chosen].sum()) for name in copied)
    carried = demand_bytes + ahead_bytes
    return LinkPhase(
        demand_bytes=demand_bytes,
        ahead_bytes=ahead_bytes,
        busy_s=busy_ns / 1e9,
        busy_share=busy_ns / 1e9 / (wall_s * num_links) if wall_s else None,
        use=carried / (wall_s * peak_bytes_per_s) if wall_s and peak_bytes_per_s else None,
    )


def _use(trace: RoutingTrace, peak_bytes_per_s: float | None, chosen: Array) -> Array | None:
    """Of each of the chosen steps, the share of what links could have carried; None where that is not known."""
    copied = copied_by_step(trace)
    if copied is None or not peak_bytes_per_s or not chosen.any():
        return None
    assert trace.step_us is not None
    could = np.maximum(trace.step_us[chosen], 1) / 1e6 * peak_bytes_per_s
    share: Array = (copied["demand_bytes"] + copied["ahead_bytes"])[chosen] / could
    return share
