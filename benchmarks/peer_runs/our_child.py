"""Decodes with this project in a process of its own. Takes one JSON object of settings, prints one of figures."""

import itertools
import json
import random
import sys
import time
from typing import Any, NamedTuple

# isort: off
import moe_offload  # before torch, as the command line has it

# isort: on
import torch
import transformers
from process_io import disk_read_bytes

from moe_offload import OffloadedModel
from moe_offload.offload.bench.measure import fill_slots
from moe_offload.offload.planning.memory import rss_bytes

RUNTIME_BYTES = 160 << 20


class _Mark(NamedTuple):
    """A moment, and what was counted up to it."""

    time_s: float
    read_bytes: int
    counts: Any


def main() -> None:
    """A prompt, some tokens to warm up, then tokens that count; then a longer prompt."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    ram_bytes = settings["ram_bytes"]
    if settings["limit_bytes"] is not None:
        # The limit counts the imports too; most of what the plan keeps for the runtime is among them.
        ram_bytes = settings["limit_bytes"] - rss_bytes() + RUNTIME_BYTES
    warmup, decode = settings["warmup_tokens"], settings["decode_tokens"]
    draw = random.Random(settings["seed"])

    def tokens(count: int) -> list[int]:
        return [draw.randrange(3, settings["vocab_size"]) for _ in range(count)]  # the first few may end a text

    begin_s = time.perf_counter()
    with OffloadedModel.from_pretrained(
        settings["model"],
        device="cpu",
        ram=ram_bytes,
        context_tokens=max(settings["prompt_tokens"] + warmup + decode, settings["prefill_tokens"]) + 1,
        prefetch=settings["prefetch"],
        warm_start=False,
    ) as offloaded:
        if settings["limit_bytes"] is None:  # as the peers, which read everything before the first token
            fill_slots(offloaded)
        load_s = time.perf_counter() - begin_s
        marks: list[_Mark] = []

        def mark(num_tokens: int = 0) -> None:
            marks.append(_Mark(time.perf_counter(), disk_read_bytes(), offloaded._meter.read()))

        def missed_bytes(first: _Mark, last: _Mark) -> float:
            """Without what was prefetched in vain: the bound is of what was missing."""
            report = offloaded._meter.between(first.counts, last.counts)
            return max(0, report.bytes_read - report.prefetch_wasted_bytes)

        prompt = torch.tensor([tokens(settings["prompt_tokens"])])
        offloaded._generator.replay(prompt, tokens(1 + warmup + decode), mark)
        counted = marks[warmup:]
        report = offloaded._meter.between(counted[0].counts, counted[-1].counts)
        cache = offloaded._residency.cache
        figures = {
            "version": f"moe-offload {moe_offload.__version__}",
            "load_s": load_s,
            "ram_bytes": ram_bytes,
            "share": sum(map(cache.num_slots, range(cache.num_layers))) / sum(offloaded.plan.num_experts),
            "step_s": [later.time_s - earlier.time_s for earlier, later in itertools.pairwise(counted)],
            "read_bytes": (counted[-1].read_bytes - counted[0].read_bytes) / decode,
            "missed_bytes": missed_bytes(counted[0], counted[-1]) / decode,
            "hit_ratio": report.hit_ratio,
            "stall_s": report.stall_s / decode,
            "prefill_s": None,
        }
        if settings["prefill_tokens"]:
            marks.clear()
            mark()
            offloaded._generator.replay(torch.tensor([tokens(settings["prefill_tokens"])]), tokens(1), mark)
            before, after = marks
            figures |= {
                "prefill_s": after.time_s - before.time_s,
                "prefill_read_bytes": after.read_bytes - before.read_bytes,
                "prefill_missed_bytes": missed_bytes(before, after),
            }
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
