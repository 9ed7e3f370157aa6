"""The forecast of a model on a machine: for every format what fits where, how fast, how long, and what to do.

`Forecast.to_dict` is the JSON of ``moe-offload plan --json``, sizes in bytes, times in seconds, rates a second; a band
is ``{"low", "mid", "high"}``::

    {"schema": 1,
     "model": {"name", "type", "layers", "experts", "top_k", "weights", "checkpoint_bytes", "is_remote"},
     "machine": {"ram_bytes", "vram_bytes", "memory", "disk", "copy", "matrix", "quantize", "download",
                 "gpus": [[number, bytes]]},
     "context_tokens", "prompt_tokens", "routing",
     "formats": [{"format", "dense_format", "pack_bytes", "packing_s": band, "fits", "needed_bytes", "refusal",
                  "ram_bytes", "vram_bytes", "resident_share", "fewest_share", "host_share", "hit_ratio": band,
                  "reach": band, "bytes_read_per_token", "tokens_per_s": band, "time_to_first_token_s": band,
                  "bound_by", "ways_s", "memory": [{"tier", "use", "size_bytes"}]}],
     "recommendation": {"format", "sentence", "command"}}

A rate of the machine is ``{"per_s", "origin"}``, its origin "measured", "given" or "assumed". Of a format that does not
fit, ``needed_bytes`` is the smallest budget that would do, and what would follow is null.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from moe_offload.errors import BudgetError, FormatError
from moe_offload.offload.forecast.band import Band
from moe_offload.offload.forecast.candidate import Candidate, candidate, packed_candidate
from moe_offload.offload.forecast.decode_time import DecodeTime, decode_time
from moe_offload.offload.forecast.hit_ratio import HitCurve, hit_curve
from moe_offload.offload.forecast.machine import Machine
from moe_offload.offload.forecast.model_shape import SOURCE, ModelShape, PackedShape
from moe_offload.offload.forecast.packing_time import packing_time
from moe_offload.offload.forecast.prompt_time import prompt_time
from moe_offload.offload.forecast.recommendation import Recommendation, recommend
from moe_offload.offload.planning.plan import Plan
from moe_offload.quant import get_format

SCHEMA = 1
FORMATS = (SOURCE, "int8", "nf4", "mixed:3.5", "nf3")
# Tried in this order until the dense part fits.
_DENSE_FORMATS = (SOURCE, "int8", "nf4")
AUTO = "auto"


@dataclass(frozen=True)
class Speed:
    """What a format that fits makes of a machine."""

    plan: Plan
    hit_ratio: Band
    reach: Band
    bytes_read_per_token: float
    decode: DecodeTime
    time_to_first_token_s: Band


@dataclass(frozen=True)
class FormatForecast:
    """One format: its pack, and either its speed or why it does not fit."""

    format: str
    dense_format: str
    pack_bytes: int
    packing_s: Band | None
    speed: Speed | None
    refusal: BudgetError | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; see the module."""
        speed = self.speed
        return {
            "format": self.format,
            "dense_format": self.dense_format,
            "pack_bytes": self.pack_bytes,
            "packing_s": None if self.packing_s is None else self.packing_s.to_dict(),
            "fits": speed is not None,
            "needed_bytes": None if self.refusal is None else self.refusal.needed_bytes,
            "refusal": None if self.refusal is None else str(self.refusal),
            "ram_bytes": speed and speed.plan.total_bytes("RAM"),
            "vram_bytes": speed and speed.plan.total_bytes("VRAM"),
            "resident_share": speed and speed.plan.resident_share,
            "fewest_share": speed and speed.plan.fewest_share,
            "host_share": speed and speed.plan.host_share,
            "hit_ratio": speed and speed.hit_ratio.to_dict(),
            "reach": speed and speed.reach.to_dict(),
            "bytes_read_per_token": speed and speed.bytes_read_per_token,
            "tokens_per_s": speed and speed.decode.tokens_per_s.to_dict(),
            "time_to_first_token_s": speed and speed.time_to_first_token_s.to_dict(),
            "bound_by": speed and speed.decode.bound_by,
            "ways_s": speed and dict(speed.decode.ways_s),
            "memory": speed
            and [{"tier": line.tier, "use": line.label, "size_bytes": line.size_bytes} for line in speed.plan.lines()],
        }


@dataclass(frozen=True)
class Forecast:
    """All formats of a model on a machine, and which to take."""

    model: dict[str, Any]
    machine: Machine
    context_tokens: int
    prompt_tokens: int
    routing: str
    formats: Sequence[FormatForecast]
    recommendation: Recommendation

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; see the module."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "machine": self.machine.to_dict(),
            "context_tokens": self.context_tokens,
            "prompt_tokens": self.prompt_tokens,
            "routing": self.routing,
            "formats": [item.to_dict() for item in self.formats],
            "recommendation": self.recommendation.to_dict(),
        }


def forecast(
    shape: ModelShape | PackedShape,
    machine: Machine,
    *,
    formats: Sequence[str] = FORMATS,
    dense_format: str = AUTO,
    routing: str = "auto",
    context_tokens: int = 4096,
    prompt_tokens: int = 512,
) -> Forecast:
    """What ``shape`` will need on ``machine`` and how fast it will run, format by format.

    ``dense_format="auto"`` keeps the dense part in the checkpoint's numbers where that fits, else in fewer bits.
    """
    if isinstance(shape, PackedShape):
        first = packed_candidate(shape, machine)
        tries: list[Iterable[Candidate]] = [[first]]
    else:
        first = candidate(shape, machine, formats[0], SOURCE)
        dense_formats = _DENSE_FORMATS if dense_format == AUTO else (dense_format,)
        tries = [_in_turn(shape, machine, spec, dense_formats) for spec in dict.fromkeys(formats)]
    layers = first.layers
    curve = hit_curve(routing, model_type=first.config.model_type, num_experts=layers[0].num_experts, top_k=first.top_k)

    def of_format(candidates: Iterable[Candidate]) -> FormatForecast | None:
        refused = None
        for item in candidates:
            packing_s = None if isinstance(shape, PackedShape) else _packing(shape, item, machine)
            try:
                plan = item.plan(machine, context_tokens=context_tokens)
            except BudgetError as error:
                refused = FormatForecast(item.expert_format, item.dense_format, item.pack_bytes, packing_s, None, error)
                continue
            speed = _speed(item, plan, machine, curve, prompt_tokens)
            return FormatForecast(item.expert_format, item.dense_format, item.pack_bytes, packing_s, speed, None)
        return refused

    found = [item for item in map(of_format, tries) if item is not None]
    num_weights = shape.num_weights if isinstance(shape, ModelShape) else None
    return Forecast(
        model={
            "name": shape.name,
            "type": first.config.model_type,
            "layers": len(layers),
            "experts": max(layer.num_experts for layer in layers),
            "top_k": first.top_k,
            "weights": num_weights,
            "checkpoint_bytes": _source_bytes(shape) if isinstance(shape, ModelShape) else None,
            "is_remote": isinstance(shape, ModelShape) and shape.is_remote,
        },
        machine=machine,
        context_tokens=context_tokens,
        prompt_tokens=prompt_tokens,
        routing=curve.note,
        formats=found,
        recommendation=recommend(shape, found, machine, context_tokens=context_tokens),
    )


def _in_turn(shape: ModelShape, machine: Machine, spec: str, dense_formats: Sequence[str]) -> Iterator[Candidate]:
    """One format of experts with each dense format, as long as they are asked for; none where it cannot be mixed."""
    with suppress(FormatError):
        for dense_format in dense_formats:
            yield candidate(shape, machine, spec, dense_format)


def _speed(item: Candidate, plan: Plan, machine: Machine, curve: HitCurve, prompt_tokens: int) -> Speed:
    context_tokens = min(prompt_tokens, plan.context_tokens)
    load = item.token_load(plan, context_tokens=context_tokens)
    hit_ratio, reach = load.hit_ratio(curve), load.reach(curve)
    return Speed(
        plan,
        hit_ratio,
        reach,
        load.expert_bytes * (1 - reach.mid),
        decode_time(load, machine, hit_ratio, reach),
        prompt_time(
            item.token_load(plan, context_tokens=context_tokens, num_slots=plan.fewest_slots),
            machine,
            prompt_tokens=prompt_tokens,
            chunk_tokens=plan.prefill_chunk_tokens,
            operations_per_token=item.operations_per_token,
        ),
    )


def _packing(shape: ModelShape, item: Candidate, machine: Machine) -> Band:
    return packing_time(
        machine, source_bytes=_source_bytes(shape), num_weights=shape.num_weights, pack_bytes=item.pack_bytes
    )


def _source_bytes(shape: ModelShape) -> int:
    """The checkpoint's bytes, guessed from the shapes where there are no headers."""
    if shape.checkpoint_bytes is not None:
        return shape.checkpoint_bytes
    return int(shape.num_weights * get_format(shape.source_weights).bits_per_weight() / 8)
