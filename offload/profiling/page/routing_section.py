"""What the routing is like: how even, how repetitive, how much one layer tells of the next."""

from collections.abc import Iterator
from dataclasses import replace

from markupsafe import Markup

from moe_offload.offload.profiling.charts.axis import index_axis, number_axis
from moe_offload.offload.profiling.charts.columns import Column, columns
from moe_offload.offload.profiling.charts.frame import frame
from moe_offload.offload.profiling.charts.heat_map import heat_map
from moe_offload.offload.profiling.charts.lines import Line, lines
from moe_offload.offload.profiling.charts.markup import element, joined
from moe_offload.offload.profiling.charts.table import table
from moe_offload.offload.profiling.page.figure import Figure, Section
from moe_offload.offload.profiling.page.numbers import count, percent, percent_axis, three_digits
from moe_offload.offload.profiling.report import ProfileReport
from moe_offload.offload.profiling.sections import (
    Coactivation,
    CoactivationMap,
    ExpertLoad,
    PublishedRepetition,
    Repetition,
)


def routing_section(report: ProfileReport, missing: tuple[str, ...]) -> Section:
    """All that the routing alone tells."""
    experts = report.experts
    figures = [*_load(experts.load)]
    if experts.repetition is not None:
        first = experts.load[0].layer if experts.load else 0
        figures += [*_repetition(experts.repetition, first), *_published(experts.published, experts.repetition)]
    if experts.coactivation is not None:
        figures += [
            *_foreseen(experts.coactivation, report),
            *_pairs(experts.coactivation),
            *_maps(experts.coactivation),
        ]
    return Section("routing", "What the routing is like", _finding(report), tuple(figures), missing)


def _finding(report: ProfileReport) -> str:
    repetition = report.experts.repetition
    known = [] if repetition is None else [share for share in repetition.share if share is not None]
    if repetition is None or not known:
        return ""
    chance = sum(repetition.random_share) / len(repetition.random_share)
    return (
        f"On average {percent(sum(known) / len(known), 0)} of a token's experts are chosen again by the next token; "
        f"chance would give {percent(chance, 0)}."
    )


def _load(load: tuple[ExpertLoad, ...]) -> Iterator[Figure]:
    if not load:
        return
    x = index_axis("layer", len(load), first=load[0].layer)
    y = number_axis(
        "entropy of the experts' load, bits", 0, max(layer.max_entropy_bits for layer in load), three_digits
    )
    bars = [
        Column(
            index,
            (("entropy", layer.entropy_bits), ("entropy-room", layer.max_entropy_bits - layer.entropy_bits)),
            f"layer {layer.layer}: {three_digits(layer.entropy_bits)} of {three_digits(layer.max_entropy_bits)} "
            f"bits; expert {layer.busiest_expert} has {percent(layer.largest_share)}; {layer.unused} never chosen; "
            f"Gini {layer.gini:.2f}",
        )
        for index, layer in enumerate(load)
    ]
    yield Figure(
        "How evenly the experts are used",
        frame(
            "entropy",
            columns(bars, x, y),
            x=x,
            y=y,
            height=160,
            summary=f"Entropy of expert load in {len(load)} layers",
        ),
        "A full column means that all experts are used alike; each bit less halves the experts that matter. Uneven "
        "layers do with fewer slots.",
        (("fill-entropy", "entropy"), ("fill-entropy-room", "up to an even load")),
    )


def _repetition(repetition: Repetition, first: int) -> Iterator[Figure]:
    measured = {
        "first": ("same first choice", repetition.first, repetition.random_first),
        "any": ("one in common", repetition.any, repetition.random_any),
        "share": ("share that repeats", repetition.share, repetition.random_share),
    }
    x, y = index_axis("layer", len(repetition.first), first=first), percent_axis("of consecutive tokens")
    drawn, legend = [], []
    for kind, (name, ratios, chance) in measured.items():
        drawn.append(
            Line(f"{kind}-random", f"{name}, by chance", tuple((i + 0.5, ratio) for i, ratio in enumerate(chance)))
        )
        tips = tuple(
            f"layer {first + i}, {name}: {percent(ratio)}, by chance {percent(chance[i])}"
            for i, ratio in enumerate(ratios)
        )
        drawn.append(Line(kind, name, tuple((i + 0.5, ratio) for i, ratio in enumerate(ratios)), tips))
        legend.append((f"line-{kind}", name))
    yield Figure(
        "How often the next token chooses the same experts",
        frame("repetition", lines(drawn, x, y), x=x, y=y, summary="Repetition of experts between consecutive tokens"),
        "The further a line lies above its dotted one, which is chance, the more a cache of recent experts can "
        "serve. Where they meet, what was used last says nothing about what comes next.",
        (*legend, ("line-random", "the same by chance")),
    )


def _published(published: tuple[PublishedRepetition, ...], repetition: Repetition) -> Iterator[Figure]:
    if not published:
        return
    depth = max(each.layer for each in published)
    rows = []
    for each in published:
        # The layer of this model that lies as deep, as a share of the way from the first to the last.
        here = round(each.layer / depth * (len(repetition.first) - 1)) if depth else 0
        rows.append(
            [
                f"layer {each.layer} of {depth + 1}",
                _span(each.first_low, each.first_high),
                percent(repetition.first[here]),
                _span(each.any_low, each.any_high),
                percent(repetition.any[here]),
            ]
        )
    model, source = published[0].model, published[0].source
    yield Figure(
        f"Beside {model}",
        table([model, "same first choice", "this model", "one in common", "this model"], rows),
        f"Published figures ({source}), each beside the layer of this model that lies as deep. Chance differs with "
        "the number of experts and of those chosen, so compare how far each is from its own.",
    )


def _span(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {percent(high)}"


def _foreseen(coactivation: Coactivation, report: ProfileReport) -> Iterator[Figure]:
    if not coactivation.recall:
        return
    first = (report.layers[0].layer if report.layers else 0) + 1
    x, y = index_axis("layer", len(coactivation.recall), first=first), percent_axis("recall")
    named = (
        ("base-recall", "from the layer's own load alone", coactivation.base_recall),
        ("table-recall", "from the layer before", coactivation.recall),
    )
    drawn = [
        Line(
            kind,
            name,
            tuple((i + 0.5, ratio) for i, ratio in enumerate(ratios)),
            tuple(f"layer {first + i}, {name}: {percent(ratio)}" for i, ratio in enumerate(ratios)),
        )
        for kind, name, ratios in named
    ]
    yield Figure(
        "What one layer's experts tell of the next one's",
        frame(
            "coactivation",
            lines(drawn, x, y),
            x=x,
            y=y,
            height=180,
            summary="Recall of a table of co-activation, by layer",
        ),
        "The share of a layer's experts that a table of frequencies names, learnt on the first half of the run and "
        "scored on the second. Only what lies above the lower line comes from the layer before.",
        tuple((f"line-{kind}", name) for kind, name, _ in named),
        half=True,
    )


def _maps(coactivation: Coactivation) -> Iterator[Figure]:
    if not coactivation.maps:
        return
    highest = max(max(map(max, each.probability)) for each in coactivation.maps)
    yield Figure(
        "Which expert follows which",
        element("div", *(_map(each, highest) for each in coactivation.maps), class_="small-multiples"),
        "For each expert of a layer (columns), how likely each of the next layer (rows) is chosen for the same "
        f"token; the strongest colour is {percent(highest)}. Single strong cells are pairs worth prefetching "
        "together. Of large layers only the busiest experts are shown.",
    )


def _map(each: CoactivationMap, highest: float) -> Markup:
    x = index_axis(f"expert of layer {each.layer}", len(each.experts), ticks=4)
    y = index_axis(f"expert of layer {each.next_layer}", len(each.next_experts), ticks=4)
    x = replace(x, ticks=tuple((at, str(each.experts[int(at)])) for at, _ in x.ticks))
    y = replace(y, ticks=tuple((at, str(each.next_experts[int(at)])) for at, _ in y.ticks))
    tips = [
        f"after expert {expert}: most likely expert {each.next_experts[row.index(max(row))]}, {percent(max(row))}"
        for expert, row in zip(each.experts, each.probability, strict=True)
    ]
    summary = f"Co-activation of layers {each.layer} and {each.next_layer}"
    return frame(
        f"coactivation-{each.layer}",
        heat_map(each.probability, x, y, highest=highest, tips=tips, gaps=len(each.experts) <= 16),
        x=x,
        y=y,
        summary=summary,
    )


def _pairs(coactivation: Coactivation) -> Iterator[Figure]:
    if not coactivation.strongest:
        return
    rows = [
        [
            f"{pair.layer}: expert {pair.expert}",
            f"{pair.layer + 1}: expert {pair.next_expert}",
            count(pair.tokens),
            f"{pair.lift:.1f} x",
        ]
        for pair in coactivation.strongest[:10]
    ]
    yield Figure(
        "The strongest pairs",
        joined([table(["layer", "next layer", "tokens", "against chance"], rows, text_columns=2)]),
        "Pairs of experts of consecutive layers that are chosen together most often, compared with what their loads "
        "alone would give.",
        half=True,
    )
