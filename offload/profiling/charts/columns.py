"""Columns along the x axis, each stacked of parts: times, counts, ratios."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from moe_offload.offload.profiling.charts.axis import Axis
from moe_offload.offload.profiling.charts.frame import SIDE
from moe_offload.offload.profiling.charts.markup import element, exact, joined

# Above so many columns the gaps between them would be hairlines of uneven width.
MOST_WITH_GAPS = 130


@dataclass(frozen=True)
class Column:
    """From ``x`` to ``x + width`` on the x axis: parts from the bottom up, as (kind, size) on the y axis."""

    x: float
    parts: tuple[tuple[str, float], ...]
    tip: str
    width: float = 1.0
    kind: str = ""


def columns(of: Sequence[Column], x: Axis, y: Axis) -> Markup:
    """The drawing of all columns, each with its numbers in ``data-x``, ``data-kinds`` and ``data-values``."""
    gap = 0.12 if len(of) <= MOST_WITH_GAPS else 0.0
    return joined(_column(column, x, y, gap) for column in of)


def _column(column: Column, x: Axis, y: Axis, gap: float) -> Markup:
    left = SIDE * x.share(column.x + gap / 2 * column.width)
    right = SIDE * x.share(column.x + (1 - gap / 2) * column.width)
    rects, total = [], 0.0
    for kind, size in column.parts:
        bottom, top = SIDE * (1 - y.share(total)), SIDE * (1 - y.share(total + size))
        total += size
        if bottom > top:
            rects.append(element("rect", class_=f"fill-{kind}", x=left, y=top, width=right - left, height=bottom - top))
    return element(
        "g",
        element("title", column.tip),
        # The whole height answers to the pointer: a column of zero can be asked for its numbers too.
        element(
            "rect",
            class_="reach",
            x=SIDE * x.share(column.x),
            y=0,
            width=SIDE * column.width / (x.high - x.low),
            height=SIDE,
        ),
        *rects,
        class_=f"column {column.kind}".strip(),
        data_x=column.x,
        data_kinds=" ".join(kind for kind, _ in column.parts),
        data_values=exact(size for _, size in column.parts),
    )
