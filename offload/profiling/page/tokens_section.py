"""Token by token: what each step waited, and which experts it found."""

from collections.abc import Iterator

from moe_offload.offload.profiling.charts.axis import number_axis
from moe_offload.offload.profiling.charts.frame import frame
from moe_offload.offload.profiling.page.decode_strip import DecodeStrip, sequence_marks
from moe_offload.offload.profiling.page.figure import Figure, Section
from moe_offload.offload.profiling.page.link_figures import link_strip
from moe_offload.offload.profiling.page.numbers import count, duration, three_digits, time_axis
from moe_offload.offload.profiling.report import ProfileReport

LEGEND = (
    ("fill-miss", "missed: read while the step waited"),
    ("fill-late", "prefetched, but waited for"),
    ("fill-hit", "there in time"),
)


def tokens_section(report: ProfileReport, missing: tuple[str, ...]) -> Section:
    """Both strips, over the same steps."""
    strip = DecodeStrip.of(report.steps)
    figures = [*_waits(report, strip), *_outcomes(report, strip), *link_strip(report, strip)] if strip.points else []
    return Section("tokens", "Token by token", _finding(report, strip), tuple(figures), missing)


def _finding(report: ProfileReport, strip: DecodeStrip) -> str:
    waits = strip.per_step(report.steps.wait_s)
    if not waits or sum(waits) == 0:
        return ""
    # The tenth of the points that waited longest, weighted alike: points cover about as many steps each.
    longest = sorted(waits, reverse=True)[: max(1, len(waits) // 10)]
    return f"The tenth of the steps that waited longest has {100 * sum(longest) / sum(waits):.0f} % of all waiting."


def _waits(report: ProfileReport, strip: DecodeStrip) -> Iterator[Figure]:
    waits = strip.per_step(report.steps.wait_s)
    if waits is None:
        return
    y = time_axis("waiting per step", max(waits))
    drawing = strip.columns([(("wait", wait_s),) for wait_s in waits], (f"waited {duration(w)}" for w in waits), y)
    yield Figure(
        "Waiting, step by step",
        frame(
            "token-wait",
            drawing,
            x=strip.axis,
            y=y,
            height=120,
            marks=sequence_marks(strip),
            summary="Waiting per decode step",
        ),
        "Time in which nothing was computed because an expert had not arrived. A dashed line is the beginning of "
        "another prompt: what comes after it shows how fast the cache follows a change of subject.",
        note=strip.note(),
    )


def _outcomes(report: ProfileReport, strip: DecodeStrip) -> Iterator[Figure]:
    steps = report.steps
    misses, hits = strip.per_step(steps.misses), strip.per_step(steps.hits)
    if misses is None or hits is None:
        return
    late = strip.per_step(steps.late) or [0.0] * len(hits)
    parts = [
        (("miss", miss), ("late", late_each), ("hit", hit - late_each))
        for miss, late_each, hit in zip(misses, late, hits, strict=True)
    ]
    y = number_axis(
        "experts asked for per step", 0, max(miss + hit for miss, hit in zip(misses, hits, strict=True)), count
    )
    tips = (
        f"{three_digits(miss)} missed, {three_digits(late_each)} late, {three_digits(hit)} in time"
        for (_, miss), (_, late_each), (_, hit) in parts
    )
    yield Figure(
        "Hits and misses, step by step",
        frame(
            "token-outcomes",
            strip.columns(parts, tips, y),
            x=strip.axis,
            y=y,
            height=160,
            marks=sequence_marks(strip),
            summary="Experts missed, late and in time per decode step",
        ),
        "What became of the experts that each step asked for. Late ones were on their way when they were needed: a "
        "deeper or better prefetch helps those; missed ones were not expected at all: slots or the policy help "
        "those.",
        LEGEND,
        strip.note(),
    )
