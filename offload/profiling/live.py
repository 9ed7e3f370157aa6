"""Profiling a loaded model: prompts run, recorded, and analysed with what only the model knows."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_offload.cache import RoutingTrace
from moe_offload.errors import ConfigError
from moe_offload.offload.bench.traffic import token_traffic
from moe_offload.offload.pack.manifest import PackManifest
from moe_offload.offload.profiling.analyse import analyse
from moe_offload.offload.profiling.machine import machine_facts, measured_rates
from moe_offload.offload.profiling.prompts import BUILT_IN, OnPrompt, Prompt
from moe_offload.offload.profiling.report import ProfileReport
from moe_offload.offload.profiling.run_facts import Rates

if TYPE_CHECKING:
    from moe_offload.offload.model import OffloadedModel


def profile(
    model: "OffloadedModel",
    prompts: Sequence[str | Prompt] | None = None,
    *,
    max_new_tokens: int = 64,
    rates: Rates | None = None,
    measure_rates: bool = True,
    trace: str | PathLike[str] | None = None,
    perfetto: str | PathLike[str] | None = None,
    on_prompt: OnPrompt | None = None,
) -> ProfileReport:
    """See `OffloadedModel.profile`."""
    chosen = _prompts(prompts)
    with model.tracing(trace) as recording:
        for number, prompt in enumerate(chosen, start=1):
            if on_prompt is not None:
                on_prompt(prompt, number, len(chosen))
            _answer(model, prompt, max_new_tokens)
    recorded = recording.trace
    if perfetto is not None:
        from moe_offload.offload.tracing.chrome_trace import write_chrome_trace

        write_chrome_trace(perfetto, recorded)
    names = [prompt.name for prompt in chosen]
    return analyse(_with_facts(model, recorded, names, measure_rates), source="run", rates=rates)


def _prompts(prompts: Sequence[str | Prompt] | None) -> list[Prompt]:
    if prompts is None:
        return list(BUILT_IN)
    if isinstance(prompts, str):
        raise ConfigError("prompts is one text; give a list of texts")
    if not prompts:
        raise ConfigError("there is no prompt to run; leave prompts out for the built-in ones")
    return [
        Prompt(f"prompt {number}", prompt, chat=True) if isinstance(prompt, str) else prompt
        for number, prompt in enumerate(prompts, start=1)
    ]


def _answer(model: "OffloadedModel", prompt: Prompt, max_new_tokens: int) -> None:
    if prompt.chat and getattr(model.tokenizer, "chat_template", None):
        model.chat([{"role": "user", "content": prompt.text}], max_new_tokens=max_new_tokens)
    else:
        model.generate(prompt.text, max_new_tokens=max_new_tokens)


def _with_facts(model: "OffloadedModel", trace: RoutingTrace, names: list[str], measure_rates: bool) -> RoutingTrace:
    """The trace, its meta with what a token reads from memory, the machine and its rates."""
    manifest, device = model.manifest, model.plan.device
    # Keys and values of an answer halfway through, on average.
    per_sequence = trace.num_tokens // max(1, len(names))
    traffic = token_traffic(model.model, manifest, context_tokens=max(1, per_sequence))
    facts: dict[str, Any] = {
        "sequence_names": names,
        "dense_bytes_per_token": traffic.dense_bytes,
        "kv_bytes_per_token": traffic.kv_bytes,
        "expert_bits": _expert_bits(manifest),
        "machine": machine_facts(device),
    }
    if measure_rates:
        folder = Path(model.model.name_or_path)
        facts["rates"] = asdict(measured_rates(manifest, folder, token_bytes=traffic.total_bytes, device=device))
    return replace(trace, meta=dict(trace.meta) | facts)


def _expert_bits(manifest: PackManifest) -> float:
    """Bits that a weight of an expert takes, scales included."""
    parts = [part for layer in manifest.layers for part in layer.parts if len(part.shape) > 1]
    return 8 * sum(part.size_bytes for part in parts) / sum(math.prod(part.shape) for part in parts)
