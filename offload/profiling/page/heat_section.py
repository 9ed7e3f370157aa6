"""Layers x experts: uses, hits and residency, one above the other, of which the page shows one at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from moe_offload.offload.profiling.charts.axis import index_axis
from moe_offload.offload.profiling.charts.frame import frame
from moe_offload.offload.profiling.charts.heat_map import LEVELS, heat_map
from moe_offload.offload.profiling.charts.markup import element
from moe_offload.offload.profiling.page.figure import Figure, Section
from moe_offload.offload.profiling.page.numbers import count, percent, three_digits
from moe_offload.offload.profiling.report import ProfileReport
from moe_offload.offload.profiling.sections import Usage

# More rows than this would be thinner than a pixel or two.
MOST_ROWS = 256


@dataclass(frozen=True)
class View:
    """One way of looking at the cells: a number for each expert of each layer, None where there is none."""

    name: str
    title: str
    cells: list[list[float | None]]
    highest: float
    write: Callable[[float | None], str]
    unit: str


def heat_section(report: ProfileReport, missing: tuple[str, ...]) -> Section:
    """All views that the report has numbers for."""
    views = list(heat_views(report.usage, experts_per_row(report)))
    return Section("experts", "Layers and experts", _finding(report), _figures(report, views), missing)


def experts_per_row(report: ProfileReport) -> int:
    """How many neighbouring experts share a row of the picture: one, unless there are very many."""
    return -(-max(report.run.num_experts, default=1) // MOST_ROWS)


def heat_views(usage: Usage, per_row: int) -> Iterator[View]:
    """Uses, hits and residency, as far as they are known; rows of several experts have their means."""
    decoded = any(any(layer) for layer in usage.decode_uses)
    uses = _rows(usage.decode_uses if decoded else usage.prefill_uses, per_row)
    phase = "decode" if decoded else "prefill"
    means: list[list[float | None]] = [[total / many for total, many in layer] for layer in uses]
    # A few experts that are used many times as often as the rest would leave all others in the palest colour.
    ordered = sorted(value or 0.0 for layer in means for value in layer)
    highest = (ordered[int(0.99 * (len(ordered) - 1))] or ordered[-1]) if ordered else 0.0
    yield View("uses", f"Uses in {phase}", means, highest, three_digits, "tokens")
    if usage.hits is not None:
        pairs = zip(_rows(usage.hits, per_row), _rows(usage.requests, per_row), strict=True)
        ratios = [
            [hits / asked if asked else None for (hits, _), (asked, _) in zip(layer_hits, layer_asked, strict=True)]
            for layer_hits, layer_asked in pairs
        ]
        yield View("hits", "Hit ratio", ratios, 1.0, percent, "of the requests hit")
    if usage.residency is not None and usage.residency.frames:
        frames = usage.residency.frames
        digits = [[sum(int(frame[layer][expert]) for frame in frames) for expert in range(len(text))]
                  for layer, text in enumerate(frames[0])]  # fmt: skip
        shares = [[total / many / (9 * len(frames)) for total, many in layer] for layer in _rows(digits, per_row)]
        yield View("residency", "Residency", [list(layer) for layer in shares], 1.0, percent, "of the time in a slot")


def _rows(layers: Sequence[Sequence[int]], per_row: int) -> list[list[tuple[int, int]]]:
    """Each layer's numbers summed over ``per_row`` neighbours, with how many they are."""
    return [
        [(sum(part), len(part)) for begin in range(0, len(layer), per_row) if (part := layer[begin : begin + per_row])]
        for layer in layers
    ]


def _finding(report: ProfileReport) -> str:
    uses = [sorted(layer, reverse=True) for layer in report.usage.decode_uses if any(layer)]
    if not uses:
        return ""
    quarter = sum(sum(layer[: max(1, len(layer) // 4)]) for layer in uses) / sum(map(sum, uses))
    never = sum(layer.count(0) for layer in uses)
    unused = f"{count(never)} of {count(sum(map(len, uses)))} were never used" if never else "every expert was used"
    return f"The busiest quarter of each layer's experts takes {percent(quarter, 0)} of the uses; {unused}."


def _figures(report: ProfileReport, views: list[View]) -> tuple[Figure, ...]:
    if not views:
        return ()
    per_row = experts_per_row(report)
    note = f"Each row is the mean of {per_row} neighbouring experts." if per_row > 1 else ""
    return (
        Figure(
            "Every expert of every layer",
            element("div", *_switch(views), *(_panel(report, view, per_row) for view in views), class_="views"),
            "Columns are layers, from the first on the left; rows are experts. Bands of strong colour are hot "
            "experts, which a cache serves well; an even field is routing that no small cache can follow. Where "
            "uses are strong and hits or residency pale, the policy evicts what it should keep.",
            note=note,
        ),
    )


def _switch(views: list[View]) -> Iterator[Markup]:
    for index, view in enumerate(views):
        name = f"view-{view.name}"
        yield element(
            "input", type="radio", name="heat", id=name, class_=name, checked="checked" if index == 0 else None
        )
        yield element("label", view.title, for_=name)


def _panel(report: ProfileReport, view: View, per_row: int) -> Markup:
    first = report.layers[0].layer if report.layers else 0
    x = index_axis("layer", len(view.cells), first=first)
    rows = max(map(len, view.cells), default=1)
    y = index_axis("expert", rows, step=per_row)
    tips = [f"layer {first + index}: {_extremes(values, view)}" for index, values in enumerate(view.cells)]
    chart = frame(
        f"heat-{view.name}",
        heat_map(view.cells, x, y, highest=view.highest, tips=tips),
        x=x,
        y=y,
        height=min(460, max(180, 14 * rows)),
        summary=f"{view.title} of {rows} rows of experts in {len(view.cells)} layers",
        data={"unit": view.unit, "per_row": str(per_row), "first_layer": str(first)},
    )
    scale = element(
        "div",
        element("span", view.write(0.0)),
        *(element("i", class_=f"level-{level}") for level in range(LEVELS)),
        element("span", f"{view.write(view.highest)} {view.unit}{' and more' if view.name == 'uses' else ''}"),
        class_="scale",
    )
    return element("div", chart, scale, class_=f"panel {view.name}")


def _extremes(values: Sequence[float | None], view: View) -> str:
    known = [value for value in values if value is not None]
    return f"{view.write(min(known))} to {view.write(max(known))} {view.unit}" if known else "never used"
