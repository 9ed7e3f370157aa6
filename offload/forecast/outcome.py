"""What a run came to, read from its report: the JSON of ``bench``, ``generate`` or ``profile``."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_offload.errors import ConfigError
from moe_offload.offload.forecast.hit_ratio import EVEN
from moe_offload.offload.forecast.machine import Machine, Rate
from moe_offload.offload.forecast.token_load import LayerLoad, TokenLoad

_MODEL_ROUTING = "model"
_SYNTHETIC_MIXTRAL = "synthetic:mixtral"
PROFILE = "moe-offload profile"


@dataclass(frozen=True)
class Prompt:
    """A prompt that was read, and what its forecast needs."""

    tokens: int
    chunk_tokens: int
    operations_per_token: float
    time_to_first_token_s: float


@dataclass(frozen=True)
class Outcome:
    """One run; ``machine`` is None where its report has no rates, ``routing`` None where the model routed itself.

    ``hit_ratio`` is of slots alone, by bytes: what was prefetched in time still had to be read.
    """

    name: str
    model_type: str | None
    load: TokenLoad
    tokens_per_s: float
    hit_ratio: float | None
    prompt: Prompt | None
    machine: Machine | None
    routing: str | None


def read_outcomes(path: Path) -> list[Outcome]:
    """Every run of a report; `ConfigError` for a file that is none."""
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    try:
        if isinstance(report, dict) and "rows" in report and "pack" in report:
            return _of_bench(report)
        if isinstance(report, dict) and "timings" in report and "load" in report:
            return [_of_answer(report)]
        if isinstance(report, dict) and report.get("format") == PROFILE:
            return [_of_profile(report)]
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(f"{path} lacks what a check needs: {error!r}; make it again with this version") from error
    raise ConfigError(
        f"{path} is no report of a run; make one with moe-offload bench --json FILE, generate --json or profile"
    )


def _of_bench(report: Mapping[str, Any]) -> list[Outcome]:
    if report["workload"]["kind"] != "decode":
        raise ConfigError("a report of prompts alone has no decode speed to check; leave out --prefill")
    pack, rates = report["pack"], report["rates"]
    outcomes = []
    for row in report["rows"]:
        setting = row["setting"]
        run = min(row["runs"], key=lambda run: abs(run["tokens_per_s"] - row["median_tokens_per_s"]))
        budget = f"{setting['resident']:.0%} resident" if setting["resident"] else setting["ram"]
        expert_bytes = run["expert_bytes_per_token"] // (pack["layers"] * pack["top_k"])
        layer = LayerLoad(pack["experts"], pack["top_k"], expert_bytes, run["resident_share"])
        outcomes.append(
            Outcome(
                name=f"{pack['name']}, {budget}, prefetch {setting['prefetch']}",
                model_type=None,
                load=TokenLoad([layer] * pack["layers"], run["dense_bytes_per_token"], run["kv_bytes_per_token"]),
                tokens_per_s=row["median_tokens_per_s"],
                hit_ratio=1 - run["bytes_missed_per_token"] / run["expert_bytes_per_token"],
                prompt=None,
                machine=cpu_machine(run["ram_bytes"], rates["memory_bytes_per_s"], rates["disk_bytes_per_s"]),
                routing=_bench_routing(report["workload"]["routing"]),
            )
        )
    return outcomes


def cpu_machine(ram_bytes: int, memory_per_s: float, disk_per_s: float) -> Machine:
    """A machine without a GPU whose rates were measured beside a run; products of many rows are not asked of it."""
    unused = Rate(1.0, "assumed")
    return Machine(ram_bytes, None, Rate(memory_per_s, "measured"), Rate(disk_per_s, "measured"), None, unused, unused)


def _bench_routing(routing: str) -> str | None:
    """What a forecast calls the routing of a benchmark; random weights route evenly."""
    if routing == _MODEL_ROUTING:
        return EVEN
    return "mixtral-8x7b" if routing == _SYNTHETIC_MIXTRAL else routing.partition(",sequence=")[0]


def _of_answer(report: Mapping[str, Any]) -> Outcome:
    load, timings = report["load"], report["timings"]
    layers = [
        LayerLoad(layer["num_experts"], layer["top_k"], layer["expert_bytes"], layer["share"], layer["host_share"])
        for layer in load["layers"]
    ]
    return Outcome(
        name=f"{report['model']}, {report['format']}, {report['new_tokens']} tokens",
        model_type=load["model_type"],
        load=TokenLoad(layers, load["dense_bytes"], load["kv_bytes"]),
        tokens_per_s=timings["tokens_per_s"],
        hit_ratio=None,  # the report's counts the prompt too
        prompt=Prompt(
            report["prompt_tokens"],
            load["prefill_chunk_tokens"],
            load["operations_per_token"],
            timings["time_to_first_token_s"],
        ),
        machine=None,
        routing=None,
    )


def _of_profile(report: Mapping[str, Any]) -> Outcome:
    facts, header = report["run"], report["header"]
    missing = [name for name in ("num_slots", "expert_bytes", "dense_bytes", "kv_bytes") if facts[name] is None]
    if missing or header["tokens_per_s"] is None:
        raise ConfigError(
            f"the profile lacks {', '.join(missing) or 'a decode speed'}: it is of a trace that did not record it; "
            "profile a run"
        )
    layers = [
        LayerLoad(experts, facts["top_k"], expert_bytes, slots / experts)
        for experts, slots, expert_bytes in zip(
            facts["num_experts"], facts["num_slots"], facts["expert_bytes"], strict=True
        )
    ]
    load = TokenLoad(layers, facts["dense_bytes"], facts["kv_bytes"])
    read_bytes, rates = header["disk_bytes_per_token"], facts["rates"]
    known = facts["device"] == "cpu" and rates["memory_bytes_per_s"] and rates["disk_bytes_per_s"]
    return Outcome(
        name=f"{facts['model']}, {facts['decode_tokens']} tokens",
        model_type=None,
        load=load,
        tokens_per_s=header["tokens_per_s"],
        hit_ratio=None if read_bytes is None else max(0.0, 1 - read_bytes / load.expert_bytes),
        prompt=None,
        machine=cpu_machine(facts["ram_bytes"] or 0, rates["memory_bytes_per_s"], rates["disk_bytes_per_s"])
        if known
        else None,
        routing=None,
    )
