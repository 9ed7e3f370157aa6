"""Layer by layer: how well the cache does, and how long a step waits there."""

from collections.abc import Iterator

from moe_offload.offload.profiling.charts.axis import index_axis
from moe_offload.offload.profiling.charts.columns import Column, columns
from moe_offload.offload.profiling.charts.frame import frame
from moe_offload.offload.profiling.page.figure import Figure, Section
from moe_offload.offload.profiling.page.numbers import count, duration, percent, percent_axis, time_axis
from moe_offload.offload.profiling.page.time_section import LEGEND, NAMES, PARTS
from moe_offload.offload.profiling.report import ProfileReport
from moe_offload.offload.profiling.sections import LayerFigures

LAYER_PARTS = tuple(part for part in PARTS if part != "other")


def layers_section(report: ProfileReport, missing: tuple[str, ...]) -> Section:
    """Hit ratios and times of every layer, as far as they are known."""
    figures = (*_hit_ratios(report.layers), *_times(report))
    return Section("layers", "Layer by layer", _finding(report.layers), figures, missing)


def _finding(layers: tuple[LayerFigures, ...]) -> str:
    known = [layer for layer in layers if layer.hit_ratio is not None]
    if not known:
        return ""
    starving = [layer for layer in known if layer.starving]
    worst = min(known, key=lambda layer: layer.hit_ratio or 0.0)
    if not starving:
        return f"No layer starves; the lowest hit ratio is {percent(worst.hit_ratio)}, in layer {worst.layer}."
    names = ", ".join(str(layer.layer) for layer in starving[:12]) + (" and others" if len(starving) > 12 else "")
    share = sum(layer.miss_share or 0.0 for layer in starving)
    who = f"Layer {names} starves" if len(starving) == 1 else f"{len(starving)} layers starve ({names})"
    return f"{who}, with {percent(share, 0)} of all misses."


def _hit_ratios(layers: tuple[LayerFigures, ...]) -> Iterator[Figure]:
    if all(layer.hit_ratio is None for layer in layers):
        return
    x, y = index_axis("layer", len(layers), first=layers[0].layer), percent_axis("hit ratio in decode")
    bars = [
        Column(
            index,
            (("starving" if layer.starving else "hit", layer.hit_ratio or 0.0),),
            f"layer {layer.layer}{', starving' if layer.starving else ''}: hit ratio {percent(layer.hit_ratio)}, "
            f"{count(layer.misses)} of {count(layer.requests)} missed ({percent(layer.miss_share)} of all misses), "
            f"{_slots(layer)}",
            kind="starving" if layer.starving else "",
        )
        for index, layer in enumerate(layers)
    ]
    yield Figure(
        "Hit ratio of each layer",
        frame("layer-hits", columns(bars, x, y), x=x, y=y, summary=f"Hit ratio of each of {len(layers)} layers"),
        "The share of the experts asked for that were there or on their way. A starving layer misses far more than its "
        "share: it has too few slots for the experts that its tokens spread over, or, as a first layer, nothing "
        "before it that could foresee them.",
        (("fill-hit", "hit ratio"), ("fill-starving", "hit ratio of a starving layer")),
    )


def _slots(layer: LayerFigures) -> str:
    return f"{layer.experts} experts" if layer.slots is None else f"{layer.slots} slots for {layer.experts} experts"


def _times(report: ProfileReport) -> Iterator[Figure]:
    layers, steps = report.layers, report.run.decode_steps
    each = [[getattr(layer, f"{part}_s") for part in LAYER_PARTS] for layer in layers]
    if steps == 0 or any(seconds is None for parts in each for seconds in parts):
        return
    per_step = [[seconds / steps for seconds in parts] for parts in each]
    x, y = index_axis("layer", len(layers), first=layers[0].layer), time_axis("time per step", max(map(sum, per_step)))
    bars = [
        Column(
            index,
            tuple(zip(LAYER_PARTS, parts, strict=True)),
            f"layer {layer.layer}: {duration(sum(parts))}, of it "
            + ", ".join(f"{NAMES[part]} {duration(seconds)}" for part, seconds in zip(LAYER_PARTS, parts, strict=True)),
        )
        for index, (layer, parts) in enumerate(zip(layers, per_step, strict=True))
    ]
    yield Figure(
        "Time of each layer in a decode step",
        frame(
            "layer-times",
            columns(bars, x, y),
            x=x,
            y=y,
            summary=f"Time per decode step in each of {len(layers)} layers",
        ),
        "Where in the model a step spends its time. A layer that waits much longer than the others has too few "
        "slots, or nothing before it that could foresee what it needs.",
        tuple(entry for entry in LEGEND if entry[0] != "fill-other"),
    )
