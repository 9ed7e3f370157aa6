"""What surrounds a drawing: axes, grid, label.

A drawing fills a square of `SIDE` by `SIDE` units, y downwards, and is stretched to whatever width the page has. Text
would be stretched with it, so the numbers along the axes are HTML, placed by percentages. That is how a chart keeps
letters of one size from a phone to a wide screen.
"""

from dataclasses import dataclass

from markupsafe import Markup

from moe_offload.offload.profiling.charts.axis import Axis
from moe_offload.offload.profiling.charts.markup import element, joined, position

SIDE = 1000


@dataclass(frozen=True)
class Mark:
    """A number on the x axis that a chart points out, what is written beside it, and a point there that is dotted."""

    kind: str
    x: float
    text: str = ""
    y: float | None = None


def frame(
    name: str,
    drawing: Markup,
    *,
    x: Axis,
    y: Axis,
    summary: str,
    height: int = 220,
    marks: tuple[Mark, ...] = (),
    data: dict[str, str] | None = None,
) -> Markup:
    """A chart around ``drawing``; ``summary`` is for those who do not see it, ``data`` becomes ``data-*``."""
    svg = element(
        "svg",
        element("title", summary),
        grid(y),
        drawing,
        *(_mark_line(mark, x, y) for mark in marks),
        viewBox=f"0 0 {SIDE} {SIDE}",
        preserveAspectRatio="none",
        role="img",
        aria_label=summary,
    )
    y_ticks = (element("span", text, style=f"top:{_percent(1 - y.share(value))}") for value, text in y.ticks)
    x_ticks = (element("span", text, style=f"left:{_percent(x.share(value))}") for value, text in x.ticks)
    return element(
        "div",
        element("div", y.label, class_="y-label"),
        element("div", *y_ticks, class_="y-ticks", aria_hidden="true"),
        element(
            "div", svg, *(_mark_text(mark, x) for mark in marks if mark.text), class_="plot", style=f"height:{height}px"
        ),
        element("div", *x_ticks, class_="x-ticks", aria_hidden="true"),
        element("div", x.label, class_="x-label"),
        class_="chart",
        data_chart=name,
        data_x_low=x.low,
        data_x_high=x.high,
        data_y_low=y.low,
        data_y_high=y.high,
        **{f"data_{key}": text for key, text in (data or {}).items()},
    )


def grid(y: Axis) -> Markup:
    """A thin line at every tick of the y axis."""
    heights = (SIDE * (1 - y.share(value)) for value, _ in y.ticks)
    return joined(element("line", class_="grid", x1=0, x2=SIDE, y1=height, y2=height) for height in heights)


def dot(x: float, y: float, *tip: Markup) -> Markup:
    """A dot: a line of no length with round ends, which stays round however the drawing is stretched."""
    return element("path", *tip, class_="dot", d=f"M{position(x)} {position(y)}h0")


def _mark_line(mark: Mark, x: Axis, y: Axis) -> Markup:
    at = SIDE * x.share(mark.x)
    return element(
        "g",
        element("line", class_="mark", x1=at, x2=at, y1=0, y2=SIDE),
        *([] if mark.y is None else [dot(at, SIDE * (1 - y.share(mark.y)))]),
        class_=f"pointed-out {mark.kind}",
        data_mark=mark.kind,
        data_x=mark.x,
        data_y=mark.y,
    )


def _mark_text(mark: Mark, x: Axis) -> Markup:
    share = x.share(mark.x)
    # Beyond the middle the text stands on the left of its line, so that it stays inside.
    side = f"right:{_percent(1 - share)}" if share > 0.5 else f"left:{_percent(share)}"
    return element("span", mark.text, class_=f"mark-text {mark.kind}", style=side)


def _percent(share: float) -> str:
    return position(100 * share) + "%"
