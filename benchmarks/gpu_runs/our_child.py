"""Decodes with this project under one setting. Takes one JSON object, prints one of figures."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from link_rates import link_rates

from moe_offload import OffloadedModel
from moe_offload.errors import MoeOffloadError
from moe_offload.offload.bench.forced_routing import ForcedRouting
from moe_offload.offload.bench.measure import fill_slots
from moe_offload.offload.bench.routing import Target
from moe_offload.offload.bench.routing_syntax import make_routing
from moe_offload.offload.bench.traffic import token_traffic
from moe_offload.offload.experts.lookahead import Lookahead
from moe_offload.offload.planning.workspace import experts_per_token

PROMPT_TOKENS = 32
QUIET_TOKENS = 16  # warm-up goes on until so many tokens have read nothing from the disk
FORESEEN = 0.8


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """One run: its counts per token, its rates, and the bound that they make."""
    device = torch.device(job["device"])
    rates = link_rates(device, job["rate_bytes"])
    total_tokens = PROMPT_TOKENS + 1 + job["warmup_tokens"] + job["new_tokens"]
    budget = {"vram": job["cap"], "miss_path": job["miss_path"]} if device.type == "cuda" else {"ram": job["cap"]}
    with OffloadedModel.from_pretrained(
        Path(job["pack"]),
        device=job["device"],
        prefetch=job["prefetch"],
        graphs=job["graphs"],
        context_tokens=total_tokens,
        warm_start=False,
        verify="first",
        **budget,
    ) as model:
        _force_routing(model, job, total_tokens)
        fill_slots(model)
        return rates | _decode(model, job, rates)


def _force_routing(model: OffloadedModel, job: dict[str, Any], num_tokens: int) -> None:
    layers = model.manifest.layers
    num_experts = min(layer.num_experts for layer in layers)
    top_k = experts_per_token(model.model.config.get_text_config(decoder=True))
    routing = make_routing(job["routing"], Target(num_tokens, len(layers), num_experts, top_k))
    if routing is None:
        return
    modules = [layer.module for layer in layers]
    forced = ForcedRouting(model.model, modules, num_experts, routing, recall=FORESEEN, seed=0)
    if isinstance(model._step.predictor, Lookahead):
        model._step.predictor.replace_guesses(forced.guess)


def _decode(model: OffloadedModel, job: dict[str, Any], rates: dict[str, float]) -> dict[str, Any]:
    marks: list[Any] = []
    reads: list[int] = []
    first = 1 + job["warmup_tokens"]

    def watch(num_tokens: int) -> None:
        reads.append(model.stats.bytes_read)
        if num_tokens in (first, first + job["new_tokens"]):
            marks.append((time.perf_counter(), model._meter.read()))

    ids = torch.randint(3, job["vocab_size"], (PROMPT_TOKENS + first + job["new_tokens"],)).tolist()
    model._generator.replay(torch.tensor([ids[:PROMPT_TOKENS]]), ids[PROMPT_TOKENS:], watch)
    (begin_s, before), (end_s, after) = marks
    report = model._meter.between(before, after)
    tokens, elapsed_s = job["new_tokens"], end_s - begin_s
    traffic = token_traffic(model.model, model.manifest, context_tokens=PROMPT_TOKENS + first + tokens // 2)
    copied = (report.bytes_copied or report.bytes_read) / tokens
    bound_s = max(copied / rates["host_to_device_bytes_per_s"], traffic.total_bytes / rates["device_bytes_per_s"])
    forward = model._graphs.forward
    return {
        "tokens_per_s": tokens / elapsed_s,
        "hit_ratio": report.hit_ratio,
        "bytes_copied_per_token": copied,
        "bytes_read_per_token": report.bytes_read / tokens,
        "disk_was_quiet": reads[first - 1] == reads[max(0, first - 1 - QUIET_TOKENS)],
        "link_share": report.bytes_copied / elapsed_s / rates["host_to_device_bytes_per_s"],
        "bound_tokens_per_s": 1 / bound_s,
        "bound_share": tokens / elapsed_s * bound_s,
        "steps_whole": forward.num_whole if forward else 0,
        "steps_by_layers": forward.num_by_layers if forward else 0,
        "graphs_off": forward.is_off if forward else None,
    }


def main() -> None:
    """The job from the standard input, figures or an error to the output."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        answer = measure(json.load(sys.stdin))
    except MoeOffloadError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
