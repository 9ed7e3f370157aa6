"""Hit ratio against the size of the cache, for every policy and for the best there can be."""

import math
from itertools import pairwise

from moe_offload.offload.profiling.charts.axis import number_axis
from moe_offload.offload.profiling.charts.frame import Mark, frame
from moe_offload.offload.profiling.charts.lines import Line, lines
from moe_offload.offload.profiling.charts.markup import joined
from moe_offload.offload.profiling.charts.table import table
from moe_offload.offload.profiling.page.figure import Figure, Section
from moe_offload.offload.profiling.page.numbers import in_unit, percent, size, whole_percent
from moe_offload.offload.profiling.report import ProfileReport
from moe_offload.offload.profiling.sections import CurvePoint, Curves, PolicyCurve


def curves_section(report: ProfileReport, missing: tuple[str, ...]) -> Section:
    """The curves and their numbers."""
    curves = report.curves
    figures = (_chart(curves), _numbers(curves)) if curves and curves.curves else ()
    return Section("cache-size", "How much memory the cache needs", _finding(curves), figures, missing)


def _finding(curves: Curves | None) -> str:
    if curves is None or not curves.curves:
        return ""
    said = []
    if curves.today is not None:
        said.append(f"Today's budget holds {_place(curves.today)}: {percent(curves.today.hit_ratio)} hits by replay")
        bound = next((curve for curve in curves.curves if curve.is_bound), None)
        if bound is not None:
            said[0] += f", where no policy could pass {percent(ratio_at(bound, curves.today.resident_share))}"
    if curves.knee is not None:
        said.append(f"The knee is at {_place(curves.knee)}, with {percent(curves.knee.hit_ratio)}")
    return ". ".join(said) + "." if said else ""


def ratio_at(curve: PolicyCurve, share: float) -> float | None:
    """The hit ratio of a curve between its points, on a straight line; None outside of them."""
    points = list(zip(curve.resident_share, curve.hit_ratio, strict=True))
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= share <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (share - x0) / (x1 - x0)
    return None


def _place(point: CurvePoint) -> str:
    of = "" if point.resident_bytes is None else f" ({size(point.resident_bytes)})"
    return f"{whole_percent(point.resident_share)} of the experts{of}"


def _chart(curves: Curves) -> Figure:
    every = curves.curves
    whole = max(
        (curve.resident_bytes[-1] for curve in every if curve.resident_bytes and curve.resident_share[-1] == 1),
        default=None,
    )
    of = "" if whole is None else f" (all of them: {size(whole)})"
    x = number_axis(f"share of the experts that have a slot{of}", 0.0, 1.0, in_unit(0.01, "%"), ticks=5)
    lowest = min(min(curve.hit_ratio) for curve in every)
    y = number_axis("hit ratio in decode", math.floor(10 * min(lowest, 0.9)) / 10, 1.0, in_unit(0.01, "%"))
    drawn = [
        Line(
            _kind(curve),
            curve.label,
            tuple(zip(curve.resident_share, curve.hit_ratio, strict=True)),
            tuple(_tip(curve, index) for index in range(len(curve.slots))),
        )
        # Bounds first, so that what one can have lies on top.
        for curve in sorted(every, key=lambda curve: not curve.is_bound)
    ]
    marks = tuple(
        Mark(name, point.resident_share, f"{name} {percent(point.hit_ratio)}", point.hit_ratio)
        for name, point in (("today", curves.today), ("knee", curves.knee))
        if point is not None
    )
    return Figure(
        "Hit ratio against cache size",
        frame(
            "curves",
            lines(drawn, x, y),
            x=x,
            y=y,
            height=320,
            marks=marks,
            summary="Hit ratio against the share of experts in memory",
        ),
        "Each line replays this run's routing with one policy at every size, without prefetching; the first use of an "
        "expert is a miss at any size. Left of the knee every slot more pays well; right of it memory is better spent "
        "elsewhere. The gap up to the bound, which knows the future, is all that a better policy could gain.",
        tuple((f"line-{_kind(curve)}", curve.label) for curve in every),
    )


# Policies that the style sheet knows by name; all others are drawn alike.
_STYLED = ("lru", "lfu", "decay", "recall", "learned")


def _kind(curve: PolicyCurve) -> str:
    if curve.is_bound:
        return "policy-bound"
    return f"policy-{curve.policy}" if curve.policy in _STYLED else "policy-other"


def _tip(curve: PolicyCurve, index: int) -> str:
    share, ratio = curve.resident_share[index], curve.hit_ratio[index]
    of = "" if curve.resident_bytes is None else f" ({size(curve.resident_bytes[index])})"
    slots = f"{curve.slots[index]} slots, {whole_percent(share)} of the experts"
    return f"{curve.label}: {percent(ratio)} hits with {slots}{of}"


def _numbers(curves: Curves) -> Figure:
    rows = []
    for curve in curves.curves:
        at = [ratio_at(curve, share) for share in (0.25, 0.5, 0.75)]
        now = ratio_at(curve, curves.today.resident_share) if curves.today else None
        rows.append([curve.label, percent(now), *map(percent, at)])
    measured = []
    if curves.measured_hit_ratio is not None:
        measured.append(f"The run itself had {percent(curves.measured_hit_ratio)} hits")
        if curves.measured_resident_ratio is not None:
            measured.append(f"{percent(curves.measured_resident_ratio)} without what prefetching brought in time")
    return Figure(
        "The same in numbers",
        joined([table(["policy", "today", "25 %", "50 %", "75 %"], rows)]),
        "Hit ratios at shares of the experts that have a slot, on straight lines between the replayed sizes.",
        note=", ".join(measured) + "." if measured else "",
    )
