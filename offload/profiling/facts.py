"""What was run: from the trace's arrays, and from its meta, which others wrote and which may lack anything."""

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import numpy as np

from moe_offload.cache.trace import Array, RoutingTrace
from moe_offload.offload.profiling.requests import DECODE, Requests, Steps, num_experts, phases, sequences
from moe_offload.offload.profiling.run_facts import Machine, Rates, RunFacts, SequenceFigures
from moe_offload.offload.profiling.sections import Exactness

T = TypeVar("T")
_LOSSLESS_PATH = "copy"
_LOSSLESS = "source"


def run_facts(
    trace: RoutingTrace,
    steps: Steps,
    requests: Requests,
    *,
    source: Literal["run", "trace"],
    trace_file: str | None,
    rates: Rates | None,
) -> RunFacts:
    """Model, settings, sequences and machine, as far as the trace knows them; ``rates`` come before the trace's own."""
    meta, decode = trace.meta, phases(trace) == DECODE
    return RunFacts(
        model=_of(meta, "model", str) or "unnamed model",
        source=source,
        trace_file=trace_file,
        recorded_at=_of(meta, "recorded_at", str),
        format=_of(meta, "format", str),
        dense_format=_of(meta, "dense_format", str),
        device=_of(meta, "device", str),
        policy=_of(meta, "policy", str),
        prefetch=_text(meta, "prefetch"),
        miss_path=_of(meta, "miss_path", str),
        ram_bytes=_count(meta, "ram_bytes"),
        vram_bytes=_count(meta, "vram_bytes"),
        context_tokens=_count(meta, "context_tokens"),
        num_experts=num_experts(trace),
        num_slots=None if trace.num_slots is None else tuple(trace.num_slots.tolist()),
        expert_bytes=None if trace.expert_bytes is None else tuple(trace.expert_bytes.tolist()),
        top_k=trace.top_k,
        dense_bytes=_count(meta, "dense_bytes_per_token"),
        kv_bytes=_count(meta, "kv_bytes_per_token"),
        prefill_tokens=int((~decode).sum()),
        decode_tokens=int(decode.sum()),
        prefill_steps=int((~steps.is_decode).sum()),
        decode_steps=int(steps.is_decode.sum()),
        sequences=_sequences(trace, steps, requests),
        rates=_rates(_of(meta, "rates", dict) or {}, rates),
        machine=_machine(_of(meta, "machine", dict)),
        versions={key: value for key, value in (_of(meta, "versions", dict) or {}).items() if isinstance(value, str)},
    )


def exactness(facts: RunFacts) -> Exactness:
    """What the answers equal, by the formats and by where misses were computed."""
    if facts.format is None:
        return Exactness(None, "the trace does not tell the format")
    lossy = [spec for spec in (facts.format, facts.dense_format) if spec not in (None, _LOSSLESS)]
    if facts.miss_path not in (None, _LOSSLESS_PATH):
        at = f"at {lossy[0]}" if lossy else "with the checkpoint's own numbers"
        return Exactness(False, f"exact to rounding {at}: the CPU computed some experts")
    if not lossy:
        return Exactness(True, "exact: the checkpoint's own numbers")
    return Exactness(False, f"exact at {lossy[0]}: identical to the fully resident model in this format")


def _sequences(trace: RoutingTrace, steps: Steps, requests: Requests) -> tuple[SequenceFigures, ...]:
    decode, sequence = phases(trace) == DECODE, sequences(trace)
    names, first_token_s = _of(trace.meta, "sequence_names", list), _of(trace.meta, "time_to_first_token_s", list)
    hits = requests.is_hit
    found = []
    for number in np.unique(sequence).tolist():
        mine = steps.sequence == number
        asked = requests.is_decode & mine[requests.step]
        found.append(
            SequenceFigures(
                name=_item(names, number, str) or f"sequence {number}",
                prompt_tokens=int((~decode & (sequence == number)).sum()),
                decode_tokens=int((decode & (sequence == number)).sum()),
                time_to_first_token_s=_first_token_s(trace, steps, mine, _number(_item(first_token_s, number, object))),
                tokens_per_s=_speed(trace, steps, mine & steps.is_decode),
                hit_ratio=float(hits[asked].mean()) if hits is not None and asked.any() else None,
            )
        )
    return tuple(found)


def _first_token_s(trace: RoutingTrace, steps: Steps, mine: Array, told: float | None) -> float | None:
    """As recorded, else the time of the prompt's steps."""
    chosen = mine & ~steps.is_decode
    if told is not None or trace.step_us is None or not chosen.any():
        return told
    return float(trace.step_us[chosen].sum(dtype=np.int64)) / 1e6


def _speed(trace: RoutingTrace, steps: Steps, chosen: Array) -> float | None:
    if trace.step_us is None or not (total_us := int(trace.step_us[chosen].sum(dtype=np.int64))):
        return None
    return float(steps.num_tokens[chosen].sum()) / total_us * 1e6


def _rates(meta: Mapping[str, Any], given: Rates | None) -> Rates:
    names = ("memory_bytes_per_s", "disk_bytes_per_s", "pcie_bytes_per_s")
    found = {name: getattr(given, name, None) or _positive(meta, name) for name in names}
    direct = _of(meta, "direct", bool) if given is None or given.direct is None else given.direct
    return Rates(**found, direct=direct)


def _machine(meta: Mapping[str, Any] | None) -> Machine | None:
    if meta is None:
        return None
    return Machine(
        cpu=_of(meta, "cpu", str) or "unknown",
        cores=_count(meta, "cores") or 0,
        threads=_count(meta, "threads") or 0,
        kernels=_of(meta, "kernels", str) or "unknown",
        gpu=_of(meta, "gpu", str),
        memory_bytes=_count(meta, "memory_bytes"),
    )


def _of(meta: Mapping[str, Any], key: str, kind: type[T]) -> T | None:
    value = meta.get(key)
    return value if isinstance(value, kind) else None


def _text(meta: Mapping[str, Any], key: str) -> str | None:
    value = meta.get(key)
    return None if value is None else str(value)


def _count(meta: Mapping[str, Any], key: str) -> int | None:
    value = meta.get(key)
    return value if type(value) is int and 0 <= value < 1 << 63 else None


def _number(value: object) -> float | None:
    if type(value) not in (int, float) or not 0 <= value < 1e18:  # type: ignore[operator]
        return None
    return float(value)  # type: ignore[arg-type]


def _positive(meta: Mapping[str, Any], key: str) -> float | None:
    return _number(meta.get(key)) or None


def _item(values: list[Any] | None, index: int, kind: type[T]) -> T | None:
    value = values[index] if values is not None and 0 <= index < len(values) else None
    return value if isinstance(value, kind) else None
