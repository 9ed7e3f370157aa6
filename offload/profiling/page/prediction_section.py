"""How well the next experts were foreseen, and what came of it."""

from collections.abc import Iterator

from moe_offload.offload.profiling.charts.axis import index_axis
from moe_offload.offload.profiling.charts.frame import frame
from moe_offload.offload.profiling.charts.lines import Line, lines
from moe_offload.offload.profiling.charts.markup import joined
from moe_offload.offload.profiling.charts.share_bar import share_bar
from moe_offload.offload.profiling.charts.table import table
from moe_offload.offload.profiling.page.figure import Figure, Section
from moe_offload.offload.profiling.page.numbers import UNKNOWN, count, duration, percent, percent_axis, size
from moe_offload.offload.profiling.report import ProfileReport
from moe_offload.offload.profiling.sections import Prediction

BYTES = {
    "used": "prefetched, there in time",
    "late": "prefetched, waited for",
    "demand": "read on demand",
    "wasted": "prefetched in vain",
}


def prediction_section(report: ProfileReport, missing: tuple[str, ...]) -> Section:
    """What was predicted, and the bytes that it moved."""
    prediction = report.prediction
    figures = (*_by_layer(report, prediction), *_by_distance(prediction), *_bytes(prediction)) if prediction else ()
    return Section("prediction", "Prediction and prefetching", _finding(prediction), figures, missing)


def _finding(prediction: Prediction | None) -> str:
    if prediction is None or not prediction.recall:
        return ""
    ahead = "one layer" if prediction.distances[0] == 1 else f"{prediction.distances[0]} layers"
    said = (
        f"{ahead.capitalize()} ahead, {percent(prediction.recall[0], 0)} of the experts asked for were foreseen, and "
        f"{percent(prediction.precision[0], 0)} of those foreseen were asked for"
    )
    if prediction.hidden_s is not None and prediction.waited_s is not None:
        said += f"; {duration(prediction.hidden_s)} of transfers went unnoticed"
        said += f", {duration(prediction.waited_s)} were waited for"
    return said + "."


def _by_layer(report: ProfileReport, prediction: Prediction) -> Iterator[Figure]:
    layers = len(prediction.layer_recall)
    if not prediction.distances or layers == 0:
        return
    first = report.layers[0].layer if report.layers else 0
    x, y = index_axis("layer", layers, first=first), percent_axis("share of experts")
    drawn, legend = [], []
    for index, distance in enumerate(prediction.distances):
        for kind, name, ratios in (
            ("recall", "recall", prediction.layer_recall),
            ("precision", "precision", prediction.layer_precision),
        ):
            style = f"{kind}-{min(index + 1, 3)}"
            label = f"{name}, {distance} ahead"
            points = tuple((layer + 0.5, ratio[index]) for layer, ratio in enumerate(ratios))
            tips = tuple(f"layer {first + i}, {label}: {percent(ratio[index])}" for i, ratio in enumerate(ratios))
            drawn.append(Line(style, label, points, tips))
            legend.append((f"line-{style}", label))
    yield Figure(
        "Recall and precision by layer",
        frame("prediction", lines(drawn, x, y), x=x, y=y, summary="Recall and precision of predictions in each layer"),
        "Recall is the share of the experts asked for that had been predicted, precision the share of those "
        "predicted that were asked for. High recall lets prefetching hide reads; low precision makes it read in "
        "vain. Ahead means layers between the prediction and its use: more of them leave more time to read, and are "
        "harder to foresee.",
        tuple(legend),
    )


def _by_distance(prediction: Prediction) -> Iterator[Figure]:
    if not prediction.distances:
        return
    rows = [
        [str(distance), percent(recall), percent(precision)]
        for distance, recall, precision in zip(
            prediction.distances, prediction.recall, prediction.precision, strict=True
        )
    ]
    yield Figure(
        "All layers together",
        table(["layers ahead", "recall", "precision"], rows),
        f"Of {prediction.predicted_per_layer} experts predicted for each layer and token.",
        half=True,
    )


def _bytes(prediction: Prediction) -> Iterator[Figure]:
    amounts = {name: getattr(prediction, f"{name}_bytes") for name in BYTES}
    known = {name: amount for name, amount in amounts.items() if amount is not None}
    if not known or sum(known.values()) == 0:
        return
    total = sum(known.values())
    parts = [
        (name, amount, f"{BYTES[name]}: {size(amount)}, {percent(amount / total)}") for name, amount in known.items()
    ]
    experts = {"used": prediction.used_experts, "late": prediction.late_experts, "wasted": prediction.wasted_experts}
    rows = [
        [BYTES[name], size(amount), percent(amount / total), count(experts[name]) if name in experts else UNKNOWN]
        for name, amount in known.items()
    ]
    yield Figure(
        "What was read, and what for",
        joined(
            [
                share_bar("prediction-bytes", parts, summary="; ".join(tip for _, _, tip in parts)),
                table(["", "bytes", "share", "experts"], rows),
            ]
        ),
        "Bytes that were there in time cost no waiting. Those in vain cost nothing either while the disk is idle; "
        "where waiting is long and they are many, prefetching is in demand's way: try --prefetch off.",
        tuple((f"fill-{name}", BYTES[name]) for name in known),
        half=True,
    )
