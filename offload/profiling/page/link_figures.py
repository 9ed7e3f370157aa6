"""What the links to the GPUs carried: in both phases, and step by step."""

from collections.abc import Iterator

from moe_offload.offload.profiling.charts.axis import number_axis
from moe_offload.offload.profiling.charts.frame import frame
from moe_offload.offload.profiling.charts.table import table
from moe_offload.offload.profiling.figures import rate
from moe_offload.offload.profiling.page.decode_strip import DecodeStrip, sequence_marks
from moe_offload.offload.profiling.page.figure import Figure
from moe_offload.offload.profiling.page.numbers import UNKNOWN, duration, in_unit, percent, size
from moe_offload.offload.profiling.report import ProfileReport
from moe_offload.offload.profiling.sections import Link

LEGEND = (("fill-miss", "on demand: a step waited for it"), ("fill-used", "ahead: nobody waited for it yet"))


def link_totals(link: Link | None) -> Iterator[Figure]:
    """How much of what the links can carry was carried."""
    if link is None:
        return
    rows = [
        [name, percent(p.use), percent(p.busy_share), size(p.demand_bytes), size(p.ahead_bytes), duration(p.busy_s)]
        for name, p in (("decode", link.decode), ("prefill", link.prefill))
        if p is not None
    ]
    rows += [
        [f"GPU {gpu.gpu}, all of the run", UNKNOWN, UNKNOWN, size(gpu.demand_bytes), size(gpu.ahead_bytes), busy]
        for gpu, busy in ((gpu, duration(gpu.busy_s)) for gpu in link.gpus)
    ]
    peaks = ", ".join(f"GPU {gpu.gpu}: {rate(gpu.peak_bytes_per_s)}" for gpu in link.gpus)
    yield Figure(
        "What the link to the GPU carried",
        table(["", "used", "busy", "on demand", "ahead", "time"], rows),
        "Used is the share of what the link could have carried in that time at its peak, the fastest copy that was "
        f"seen ({peaks}); busy the share of the time in which it was copying. Busy but little used: copies are small, "
        "or come from memory that is not page-locked. A link that is used to nearly all leaves only traffic to save: "
        "more slots, fewer bits, or --miss-path.",
    )


def link_strip(report: ProfileReport, strip: DecodeStrip) -> Iterator[Figure]:
    """The bytes of each decode step."""
    demand, ahead = strip.per_step(report.steps.copied_demand_bytes), strip.per_step(report.steps.copied_ahead_bytes)
    busy = strip.per_step(report.steps.link_busy_s)
    if demand is None or ahead is None or busy is None:
        return
    most = max(x + y for x, y in zip(demand, ahead, strict=True))
    unit, name = next(((u, n) for u, n in ((1 << 30, "GiB"), (1 << 20, "MiB")) if most >= u), (1 << 10, "KiB"))
    y = number_axis("copied to GPUs per step", 0, most, in_unit(unit, name))
    parts = [(("miss", x), ("used", z)) for x, z in zip(demand, ahead, strict=True)]
    tips = (
        f"{size(x)} on demand, {size(z)} ahead, busy {duration(b)}" for x, z, b in zip(demand, ahead, busy, strict=True)
    )
    yield Figure(
        "Copied to the GPU, step by step",
        frame(
            "token-link",
            strip.columns(parts, tips, y),
            x=strip.axis,
            y=y,
            height=120,
            marks=sequence_marks(strip),
            summary="Bytes copied to GPUs per decode step",
        ),
        "What each step sent over the link, by what was enqueued in it. What is sent on demand holds the step up.",
        LEGEND,
        strip.note(),
    )
