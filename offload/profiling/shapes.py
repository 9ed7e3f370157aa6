"""Whether the lists of a report that was read fit together: the page and the terminal index them without asking."""

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from moe_offload.offload.pack.strict_json import JsonShapeError

if TYPE_CHECKING:
    from moe_offload.offload.profiling.report import ProfileReport
    from moe_offload.offload.profiling.sections import ExpertStatistics, Prediction, Usage


def check_shapes(report: "ProfileReport") -> None:
    """`JsonShapeError` where a list is longer or shorter than it has to be."""
    num_layers = len(report.run.num_experts)
    _length("run.num_slots", report.run.num_slots, num_layers)
    _length("run.expert_bytes", report.run.expert_bytes, num_layers)
    _length("layers", report.layers, num_layers)
    _check_usage(report.usage, report.run.num_experts)
    _same_lengths("steps", report.steps, len(report.steps.first_step))
    if report.curves is not None:
        for index, curve in enumerate(report.curves.curves):
            _same_lengths(f"curves.curves[{index}]", curve, len(curve.slots))
    if report.prediction is not None:
        _check_prediction(report.prediction, num_layers)
    _check_experts(report.experts, num_layers)


def _check_usage(usage: "Usage", num_experts: Sequence[int]) -> None:
    for name in ("prefill_uses", "decode_uses", "requests", "hits"):
        rows = getattr(usage, name)
        _length(f"usage.{name}", rows, len(num_experts))
        for row, experts in zip(rows or (), num_experts, strict=False):
            _length(f"a layer of usage.{name}", row, experts)
    if usage.residency is None:
        return
    _length("usage.residency.first_token", usage.residency.first_token, len(usage.residency.frames))
    for frame in usage.residency.frames:
        _length("a frame of usage.residency", frame, len(num_experts))
        for digits, experts in zip(frame, num_experts, strict=True):
            _length("a layer of usage.residency", digits, experts)
            if not (digits.isascii() and digits.isdigit()):
                raise JsonShapeError(f"a layer of usage.residency has other than digits: {digits!r:.60}")


def _check_prediction(prediction: "Prediction", num_layers: int) -> None:
    num_distances = len(prediction.distances)
    for name in ("recall", "precision"):
        _length(f"prediction.{name}", getattr(prediction, name), num_distances)
        rows = getattr(prediction, f"layer_{name}")
        _length(f"prediction.layer_{name}", rows, num_layers)
        for row in rows:
            _length(f"a layer of prediction.layer_{name}", row, num_distances)


def _check_experts(experts: "ExpertStatistics", num_layers: int) -> None:
    _length("experts.load", experts.load, num_layers)
    if experts.repetition is not None:
        _same_lengths("experts.repetition", experts.repetition, num_layers)
    if experts.coactivation is not None:
        _length("experts.coactivation.recall", experts.coactivation.recall, num_layers - 1)
        _length("experts.coactivation.base_recall", experts.coactivation.base_recall, num_layers - 1)
        for chart in experts.coactivation.maps:
            _length("a map's probability", chart.probability, len(chart.experts))
            for row in chart.probability:
                _length("a row of a map's probability", row, len(chart.next_experts))


def _same_lengths(where: str, section: Any, length: int) -> None:
    for field in fields(section):
        value = getattr(section, field.name)
        if isinstance(value, tuple):
            _length(f"{where}.{field.name}", value, length)


def _length(where: str, value: Sequence[Any] | None, length: int) -> None:
    if value is not None and len(value) != length:
        raise JsonShapeError(f"{where} has {len(value)} entries instead of {length}")
