"""One bar that is a whole, cut into its parts."""

from collections.abc import Sequence

from markupsafe import Markup

from moe_offload.offload.profiling.charts.frame import SIDE
from moe_offload.offload.profiling.charts.markup import element


def share_bar(name: str, parts: Sequence[tuple[str, float, str]], *, summary: str) -> Markup:
    """Parts as (kind, size, tip) from left to right, each as wide as its share of the sum."""
    total = sum(size for _, size, _ in parts) or 1.0
    rects, begin = [], 0.0
    for kind, size, tip in parts:
        width = SIDE * size / total
        rects.append(
            element(
                "rect",
                element("title", tip),
                class_=f"fill-{kind}",
                x=SIDE * begin / total,
                y=0,
                width=width,
                height=SIDE,
                data_kind=kind,
                data_value=size,
            )
        )
        begin += size
    svg = element(
        "svg",
        element("title", summary),
        *rects,
        viewBox=f"0 0 {SIDE} {SIDE}",
        preserveAspectRatio="none",
        role="img",
        aria_label=summary,
    )
    return element("div", svg, class_="share-bar", data_chart=name)
