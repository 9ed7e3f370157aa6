"""A field of cells, the colour of each telling its number."""

from collections.abc import Sequence

from markupsafe import Markup

from moe_offload.offload.profiling.charts.axis import Axis
from moe_offload.offload.profiling.charts.frame import SIDE
from moe_offload.offload.profiling.charts.markup import element, exact, joined, position

LEVELS = 10
MOST_WITH_GAPS = 1200


def level_of(value: float, highest: float) -> int:
    """Which of the colours a number from 0 to ``highest`` gets: 0 the palest, `LEVELS` - 1 the strongest."""
    return min(LEVELS - 1, int(LEVELS * value / highest)) if highest > 0 else 0


def heat_map(
    fields: Sequence[Sequence[float | None]],
    x: Axis,
    y: Axis,
    *,
    highest: float,
    tips: Sequence[str],
    gaps: bool = True,
) -> Markup:
    """Column i of the drawing is ``fields[i]``, bottom up, with its numbers in ``data-values``; None is unknown.

    A column is one path for each colour rather than one element for each cell: 94 layers of 256 experts stay small.
    """
    drawn = (
        _column(index, values, x, y, highest, tip) for index, (values, tip) in enumerate(zip(fields, tips, strict=True))
    )
    return joined([*drawn, *(_mesh(x, y) if gaps else ())])


def _mesh(x: Axis, y: Axis) -> list[Markup]:
    """Gaps between the cells, where they are large enough to afford them."""
    if x.high * y.high > MOST_WITH_GAPS:
        return []
    upright = "".join(f"M{position(SIDE * x.share(index))} 0v{SIDE}" for index in range(1, int(x.high)))
    level = "".join(f"M0 {position(SIDE * y.share(index))}h{SIDE}" for index in range(1, int(y.high)))
    return [element("path", class_="mesh", d=upright + level)]


def _column(index: int, values: Sequence[float | None], x: Axis, y: Axis, highest: float, tip: str) -> Markup:
    left, right = SIDE * x.share(index), SIDE * x.share(index + 1)
    runs: dict[str, list[str]] = {}
    begin = 0
    kinds = ["unknown" if value is None else f"level-{level_of(value, highest)}" for value in values]
    for end in range(1, len(kinds) + 1):
        if end < len(kinds) and kinds[end] == kinds[begin]:
            continue
        top, bottom = SIDE * (1 - y.share(end)), SIDE * (1 - y.share(begin))
        rect = f"M{position(left)} {position(top)}h{position(right - left)}v{position(bottom - top)}H{position(left)}z"
        runs.setdefault(kinds[begin], []).append(rect)
        begin = end
    return element(
        "g",
        element("title", tip),
        *(element("path", class_=kind, d="".join(rects)) for kind, rects in sorted(runs.items())),
        class_="cells",
        data_x=index,
        data_values=exact(values),
    )
