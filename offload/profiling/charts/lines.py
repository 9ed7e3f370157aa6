"""Lines over the x axis: one for each thing that is compared."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from moe_offload.offload.profiling.charts.axis import Axis
from moe_offload.offload.profiling.charts.frame import SIDE, dot
from moe_offload.offload.profiling.charts.markup import element, exact, joined, position

# Beyond so many points dots would hide the line.
MOST_DOTS = 100


@dataclass(frozen=True)
class Line:
    """Points from left to right; where y is None nothing is known, and the line is broken."""

    kind: str
    name: str
    points: tuple[tuple[float, float | None], ...]
    tips: tuple[str, ...] = ()


def lines(of: Sequence[Line], x: Axis, y: Axis) -> Markup:
    """The drawing of all lines, each with its numbers in ``data-x`` and ``data-y``; the last one lies on top."""
    return joined(_line(line, x, y) for line in of)


def _line(line: Line, x: Axis, y: Axis) -> Markup:
    path, pen = [], "M"
    for at_x, at_y in line.points:
        if at_y is None:
            pen = "M"
            continue
        path.append(f"{pen}{position(SIDE * x.share(at_x))} {position(SIDE * (1 - y.share(at_y)))}")
        pen = "L"
    dots = (
        dot(SIDE * x.share(at_x), SIDE * (1 - y.share(at_y)), element("title", tip))
        for (at_x, at_y), tip in zip(line.points, line.tips, strict=True)
        if at_y is not None
    )
    return element(
        "g",
        element("title", line.name),
        element("path", class_="line", d="".join(path)),
        *(dots if line.tips and len(line.points) <= MOST_DOTS else ()),
        class_=f"series {line.kind}",
        data_series=line.kind,
        data_x=exact(at_x for at_x, _ in line.points),
        data_y=exact(at_y for _, at_y in line.points),
    )
