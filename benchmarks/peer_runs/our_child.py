"""Decodes with this project in a process of its own. Takes one JSON object of settings, prints one of figures."""

import itertools
import json
import random
import sys
import time
from pathlib import Path

# isort: off
import moe_offload  # before torch, as the command line has it

# isort: on
import torch
import transformers
from process_io import disk_read_bytes

from moe_offload import OffloadedModel
from moe_offload.quant import backend_name

MIB = 1 << 20
# Of the limit, what the budget does not count: pages of the libraries' code in use, and the system's own bookkeeping.
MARGIN_BYTES = 80 * MIB


def _anonymous_bytes() -> int:
    """Memory that this process holds and that no file could give back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


class _RandomTokens(transformers.LogitsProcessor):
    """Leaves one token possible, drawn at random; notes when it is asked, which is once the logits are there."""

    def __init__(self, vocab_size: int, draw: random.Random) -> None:
        self._vocab_size, self._draw = vocab_size, draw
        self.times_s: list[float] = []
        self.read_bytes: list[int] = []
        self.reports: list[object] = []
        self.meter = lambda: None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times_s.append(time.perf_counter())
        self.read_bytes.append(disk_read_bytes())
        self.reports.append(self.meter())
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self._draw.randrange(self._vocab_size)] = 0
        return forced


def _generate(offloaded: OffloadedModel, tokens: list[int], count: int, forced: _RandomTokens) -> float:
    """Run, and say when it began."""
    begin_s = time.perf_counter()
    offloaded.model.generate(
        input_ids=torch.tensor([tokens]),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        logits_processor=[forced],
    )
    return begin_s


def main() -> None:
    """A prompt, some tokens to warm up, then tokens that count; then a longer prompt."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    ram_bytes = settings["ram_bytes"]
    if settings["limit_bytes"] is not None:
        ram_bytes = settings["limit_bytes"] - _anonymous_bytes() - MARGIN_BYTES
    longest = settings["prompt_tokens"] + settings["warmup_tokens"] + settings["decode_tokens"] + 1
    draw = random.Random(settings["seed"])
    vocab_size = settings["vocab_size"]
    begin_s = time.perf_counter()
    with OffloadedModel.from_pretrained(
        settings["model"],
        device="cpu",
        ram=ram_bytes,
        context_tokens=max(longest, settings["prefill_tokens"] + 1),
        prefetch=settings["prefetch"],
    ) as offloaded:
        load_s = time.perf_counter() - begin_s
        forced = _RandomTokens(vocab_size, draw)
        forced.meter = offloaded._meter.read
        prompt = [draw.randrange(vocab_size) for _ in range(settings["prompt_tokens"])]
        warmup = settings["warmup_tokens"]
        with torch.inference_mode():
            _generate(offloaded, prompt, warmup + settings["decode_tokens"] + 1, forced)
        times_s = forced.times_s[warmup:]
        report = offloaded._meter.since(forced.reports[warmup])
        decode_tokens = len(times_s) - 1
        slot_bytes = sum(layer.slot_bytes for layer in offloaded.manifest.layers) / len(offloaded.manifest.layers)
        figures = {
            "version": f"moe-offload {moe_offload.__version__}, {backend_name()}",
            "load_s": load_s,
            "ram_bytes": ram_bytes,
            "share": offloaded.plan.resident_share,
            "step_s": [later - earlier for earlier, later in itertools.pairwise(times_s)],
            "read_bytes": (forced.read_bytes[-1] - forced.read_bytes[warmup]) / decode_tokens,
            # Without what was prefetched in vain: the bound is of what was missing.
            "missed_bytes": max(0, report.bytes_read - report.prefetch_wasted * slot_bytes) / decode_tokens,
            "hit_ratio": report.hit_ratio,
            "stall_s": report.stall_s / decode_tokens,
            "prefill_s": None,
        }
        if settings["prefill_tokens"]:
            prompt = [draw.randrange(vocab_size) for _ in range(settings["prefill_tokens"])]
            forced.times_s.clear()
            read_bytes = disk_read_bytes()
            with torch.inference_mode():
                begin_s = _generate(offloaded, prompt, 1, forced)
            figures |= {
                "prefill_s": forced.times_s[0] - begin_s,
                "prefill_read_bytes": disk_read_bytes() - read_bytes,
            }
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
