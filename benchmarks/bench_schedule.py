"""How much of the bound the order of reads and computing reaches, whatever the machine is busy with.

The cache, the residency, the guesses in staging and the reader's threads are the real ones; the disk, the kernels and
the dense part are sleeps of given lengths, and the routers' predictions are right with a given probability. The bound
of a token is the larger of the time to read the experts that its layers do not hold and the time to compute it.
"""

import argparse
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from moe_offload.cache import ExpertCache
from moe_offload.offload.experts.residency import Residency
from moe_offload.offload.pack.manifest import ExpertSpec
from moe_offload.offload.streaming.reader import ExpertReader
from moe_offload.offload.tiers.cpu_tier import CpuTier

PAGE_BYTES = 4096
WARMUP_TOKENS = 6


class SleepingDisk:
    """One disk that delivers a page, which stands for a chunk of an expert, in ``page_s``, one after another."""

    def __init__(self, page_s: float) -> None:
        self.busy_s = 0.0
        self._page_s = page_s
        self._free_s = 0.0
        self._lock = threading.Lock()

    def open(self, path: Path) -> "SleepingDisk":
        return self

    def pread_into(self, into: memoryview, offset_bytes: int) -> int:
        took_s = self._page_s * len(into) / PAGE_BYTES
        with self._lock:
            self._free_s = max(time.perf_counter(), self._free_s) + took_s
            self.busy_s += took_s
            done_s = self._free_s
        time.sleep(max(0.0, done_s - time.perf_counter()))
        return len(into)

    def close(self) -> None: ...


class Run:
    """Decodes tokens whose routing is drawn once, for every depth of lookahead the same."""

    def __init__(self, options: argparse.Namespace, depth: int) -> None:
        self.options, self.depth = options, depth
        self.disk = SleepingDisk(options.read_ms / 1000 / options.chunks)
        layer = SimpleNamespace(
            parts=(),
            slot_bytes=PAGE_BYTES * options.chunks,
            num_experts=options.experts,
            experts=[ExpertSpec("experts", 0, "")] * options.experts,
        )
        manifest: Any = SimpleNamespace(layers=[layer] * options.layers)
        reader = ExpertReader(manifest, Path(), disk=self.disk, chunk_bytes=PAGE_BYTES, verify="off")
        num_slots = [options.slots] * options.layers
        tier = CpuTier(manifest, reader, num_slots=num_slots, num_staging_slots=options.staging)
        self.residency = Residency(ExpertCache([options.experts] * options.layers, num_slots, "decay"), tier)
        draw = random.Random(options.seed)
        self.routing = [
            [draw.sample(range(options.experts), options.top_k) for _ in range(options.layers)]
            for _ in range(WARMUP_TOKENS + options.tokens)
        ]
        self.guessing = random.Random(options.seed)
        self.predicted: set[int] = set()

    def guess(self, chosen: Sequence[int]) -> list[int]:
        others = [expert_idx for expert_idx in range(self.options.experts) if expert_idx not in chosen]
        self.guessing.shuffle(others)
        return [e if self.guessing.random() < self.options.recall else others.pop() for e in chosen]

    def token(self, token_idx: int) -> None:
        for layer_idx, chosen in enumerate(self.routing[token_idx]):
            time.sleep(self.options.dense_ms / 1000)

            def issued(layer_idx: int = layer_idx, chosen: Sequence[int] = chosen) -> None:
                if layer_idx in self.predicted:
                    self.residency.cancel_prefetches(layer_idx, chosen)
                    self.predicted.remove(layer_idx)
                for ahead in range(layer_idx + 1, min(layer_idx + 1 + self.depth, self.options.layers)):
                    guess = self.guess(self.routing[token_idx][ahead])
                    if ahead in self.predicted:
                        self.residency.cancel_prefetches(ahead, guess)
                    self.predicted.add(ahead)
                    self.residency.prefetch(ahead, guess)

            self.residency.run_together(
                layer_idx,
                chosen,
                lambda experts: time.sleep(len(experts) * self.options.compute_ms / 1000),
                issued=issued,
            )

    def row(self) -> str:
        for token_idx in range(WARMUP_TOKENS):
            self.token(token_idx)
        residency, options = self.residency, self.options
        missed, busy_s = residency.cache.stats.num_missed("decode"), self.disk.busy_s
        read_bytes, wasted_bytes = residency.bytes_read, residency.prefetch_wasted_bytes
        begin_s = time.perf_counter()
        for token_idx in range(WARMUP_TOKENS, WARMUP_TOKENS + options.tokens):
            self.token(token_idx)
        took_s = time.perf_counter() - begin_s
        needed_s = (residency.cache.stats.num_missed("decode") - missed) * options.read_ms / 1000
        compute_s = options.tokens * options.layers * (options.dense_ms + options.top_k * options.compute_ms) / 1000
        wasted = (residency.prefetch_wasted_bytes - wasted_bytes) / max(1, residency.bytes_read - read_bytes)
        busy = (self.disk.busy_s - busy_s) / took_s
        residency.close()
        return (
            f"| {self.depth} | {took_s / options.tokens * 1000:.0f} | {max(needed_s, compute_s) / took_s:.0%} "
            f"| {busy:.0%} | {wasted:.0%} |"
        )


def main() -> None:
    """Print a Markdown table, a row a depth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=8, help="of a layer")
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--slots", type=int, default=4, help="of a layer")
    parser.add_argument("--staging", type=int, default=2)
    parser.add_argument("--read-ms", type=float, default=24.0, help="to read an expert")
    parser.add_argument("--chunks", type=int, default=23, help="of an expert")
    parser.add_argument("--compute-ms", type=float, default=2.7, help="to compute an expert")
    parser.add_argument("--dense-ms", type=float, default=1.5, help="for the rest of a layer")
    parser.add_argument("--recall", type=float, default=0.65, help="how often a prediction is right")
    parser.add_argument("--depths", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print("| layers ahead | ms a token | of bound | disk busy | read in vain |\n|---|---|---|---|---|")
    for depth in options.depths:
        print(Run(options, depth).row(), flush=True)


if __name__ == "__main__":
    main()
