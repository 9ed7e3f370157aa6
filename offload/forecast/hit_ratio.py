"""How often an expert that a token asks for will be in its slot: recorded statistics, or a trace of one's own.

`routing_statistics.json` is written by ``benchmarks/routing_statistics.py``: hit ratios of the runtime's own cache over
recorded routing of several models, by the share of a layer's experts that have slots, with their sources.
"""

import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from moe_offload.errors import ConfigError
from moe_offload.offload.forecast.band import Band

STATISTICS = Path(__file__).with_name("routing_statistics.json")
EVEN = "even"
# What a cache gains over its share of the experts where routers are random, as a part of share x (1 - share): next to
# nothing in two layers of eight experts, most in deeper stacks, where tokens grow alike (benchmarks/plan_check.py).
_EVEN_GAIN = Band(0.0, 0.35, 0.8)


@dataclass(frozen=True)
class HitCurve:
    """Hit ratio over the share of a layer's experts that have slots, between points; ``note`` says where it is from."""

    note: str
    points: tuple[tuple[float, Band], ...]

    def at(self, share: float) -> Band:
        """The band at ``share``, which is 0 to 1: all slots filled, the cache warm."""
        if share >= 1:
            return Band.exactly(1.0)
        known = [(0.0, Band.exactly(0.0)), *self.points, (1.0, Band.exactly(1.0))]
        for (left, below), (right, above) in itertools.pairwise(known):
            if share <= right:
                part = (share - left) / (right - left)
                return Band(
                    *(
                        low + part * (high - low)
                        for low, high in ((below.low, above.low), (below.mid, above.mid), (below.high, above.high))
                    )
                )
        raise AssertionError("shares are at most one")


@dataclass(frozen=True)
class RecordedModel:
    """One model of the statistics."""

    name: str
    model_type: str
    num_experts: int
    top_k: int
    source: str
    curve: HitCurve


@cache
def recorded_models() -> tuple[RecordedModel, ...]:
    """All models of the statistics."""
    models = []
    for entry in json.loads(STATISTICS.read_text())["models"]:
        points = tuple((point["slots"] / entry["experts"], _around(point)) for point in entry["points"])
        note = f"recorded routing of {entry['name']}, {entry['tokens']} tokens"
        models.append(
            RecordedModel(
                entry["name"],
                entry["model_type"],
                entry["experts"],
                entry["top_k"],
                entry["source"],
                HitCurve(note, points),
            )
        )
    return tuple(models)


def hit_curve(routing: str, *, model_type: str, num_experts: int, top_k: int) -> HitCurve:
    """The curve for a model: ``auto`` (its own if it was recorded, else the middle half of those that were), the name
    of a recorded model, ``even`` for random routers, or ``trace:FILE``.
    """
    recorded = {model.name: model for model in recorded_models()}
    if routing == "auto":
        for model in recorded.values():
            if (model.model_type, model.num_experts, model.top_k) == (model_type, num_experts, top_k):
                return model.curve
        return _middle_half([model.curve for model in recorded.values()])
    if routing == EVEN:
        return even_curve()
    if routing in recorded:
        return recorded[routing].curve
    if routing.startswith("trace:"):
        from moe_offload.offload.forecast.trace_hits import trace_curve

        return trace_curve(Path(routing.removeprefix("trace:")))
    raise ConfigError(f"{routing!r} is no routing; use auto, even, trace:FILE or one of {', '.join(recorded)}")


def even_curve() -> HitCurve:
    """Routers that choose almost uniformly, as random weights do: hits are the share of the slots, or a little more."""

    def band(share: float) -> Band:
        gain = _EVEN_GAIN.scaled(share * (1 - share))
        return Band(share + gain.low, share + gain.mid, share + gain.high)

    return _sampled("routers that choose evenly", band)


def _middle_half(curves: Sequence[HitCurve]) -> HitCurve:
    """From the lower to the upper quartile of the models' curves, with their median."""

    def band(share: float) -> Band:
        low, mid, high = statistics.quantiles((curve.at(share).mid for curve in curves), n=4, method="inclusive")
        return Band(low, mid, high)

    return _sampled(f"the middle half of {len(curves)} recorded models", band)


def _sampled(note: str, band: Callable[[float], Band]) -> HitCurve:
    return HitCurve(note, tuple((step / 32, band(step / 32)) for step in range(1, 32)))


def _around(point: dict[str, float]) -> Band:
    """A recorded value, and as much to both sides as sequences differ among themselves."""
    mid, spread = point["hit_ratio"], max(point["spread"], 0.01)
    return Band(max(0.0, mid - spread), mid, min(1.0, mid + spread))
