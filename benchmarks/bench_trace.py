"""What recording a trace costs while decoding: without and with it in turn, A B A B, within one answer.

    python benchmarks/bench_trace.py [--blocks 20] [--block-steps 32] [--prefetch auto] [--pack FOLDER --ram 4GiB]

The built-in demo, and a synthetic pack in the shape of Mixtral 8x7B with fewer layers; or one pack that is named. A
block of steps that is recorded to a file is compared with the mean of its two neighbours that are not, so that a
machine that gets slower, or a text that gets longer, does not count. Of a block the lower quartile of the steps' times
counts, since what disturbs a step only makes it longer; processor time, all threads together, is that of the whole
block, and so has the thread that makes arrays of what was noted, and writes them.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from kernel_timing import machine, print_table

from moe_offload import OffloadedModel
from moe_offload.cache import read_trace
from moe_offload.offload.bench.packs import Shape, synthetic_pack
from moe_offload.offload.demo.build import ensure_demo
from moe_offload.offload.tracing.recording import Recording

_PROMPT_TOKENS = 32
_SKIPPED_STEPS = 2  # after a switch


class Alternation:
    """Called after every token: switches recording on and off, and notes what steps took in between."""

    def __init__(self, model: OffloadedModel, path: Path, block_steps: int) -> None:
        self.blocks: list[list[tuple[float, float]]] = [[]]  # (wall clock, processor time) of each step, off first
        self._model, self._path, self._block_steps = model, path, block_steps
        self._recording: Recording | None = None
        self._steps = 0
        self._since = (time.perf_counter(), time.process_time())

    def __call__(self, num_tokens: int) -> None:
        now = (time.perf_counter(), time.process_time())
        self._steps += 1
        if self._steps > _SKIPPED_STEPS:
            self.blocks[-1].append((now[0] - self._since[0], now[1] - self._since[1]))
        if self._steps == self._block_steps:
            self._switch()
        self._since = (time.perf_counter(), time.process_time())

    def _switch(self) -> None:
        self._steps = 0
        self.blocks.append([])
        if self._recording is None:
            self._recording = self._model.tracing(self._path)
        else:
            self._recording.end()
            self._recording = None


def cost(blocks: list[float]) -> float:
    """Median over the recorded blocks, every second one: each by the mean of its neighbours, less 1."""
    return statistics.median(
        on / ((before + after) / 2) - 1
        for before, on, after in zip(blocks[::2], blocks[1::2], blocks[2::2], strict=False)
    )


def measured(name: str, pack: Path, ram: str, arguments: argparse.Namespace) -> list[str]:
    """A row of the table."""
    num_tokens = _PROMPT_TOKENS + 1 + arguments.block_steps * (2 * arguments.blocks + 3)
    with (
        OffloadedModel.from_pretrained(
            pack, device="cpu", ram=ram, prefetch=arguments.prefetch, warm_start=False, context_tokens=num_tokens + 1
        ) as model,
        tempfile.TemporaryDirectory() as folder,
    ):
        vocabulary = int(model.model.config.get_text_config(decoder=True).vocab_size)
        ids = torch.randint(3, vocabulary, (num_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
        path = Path(folder) / "trace.npz"
        alternation = Alternation(model, path, arguments.block_steps)
        model._generator.replay(torch.tensor([ids[:_PROMPT_TOKENS]]), ids[_PROMPT_TOKENS:], alternation)
        trace = read_trace(path)
        file_bytes = path.stat().st_size / (trace.num_tokens * trace.num_layers)
        hit_ratio = model.stats.hit_ratio
    blocks = alternation.blocks[2 : 2 * arguments.blocks + 3]  # the first two warm up
    wall_s = [statistics.quantiles([wall for wall, _ in block], n=4)[0] for block in blocks]
    processor_s = [statistics.fmean(processor for _, processor in block) for block in blocks]
    step_s, step_processor_s = statistics.median(wall_s[::2]), statistics.median(processor_s[::2])
    return [
        name,
        f"{hit_ratio:.0%}",
        f"{1e3 * step_s:.2f}",
        f"{cost(wall_s):+.2%}",
        f"{1e3 * step_processor_s:.2f}",
        f"{cost(processor_s):+.2%}",
        f"{file_bytes:.0f}",
    ]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=20, help="that are recorded")
    parser.add_argument("--block-steps", type=int, default=32)
    parser.add_argument("--layers", type=int, default=4, help="of the synthetic pack")
    parser.add_argument("--prefetch", default="auto", type=lambda text: int(text) if text.isdecimal() else text)
    parser.add_argument("--only", help="rows whose name begins with this")
    parser.add_argument("--pack", type=Path)
    parser.add_argument("--ram", default="2GiB", help="for the pack that is named")
    parser.add_argument("--folder", type=Path, help="for the synthetic pack, which stays there")
    arguments = parser.parse_args()
    shape = Shape("mixtral-8x7b", layers=arguments.layers, vocab=4096, format="nf4")
    cases = {
        "demo, 720 MiB": (ensure_demo, "720MiB"),
        "demo, all resident": (ensure_demo, "4GiB"),
        f"{shape.name}, all resident": (lambda: synthetic_pack(shape, arguments.folder), "8GiB"),
    }
    if arguments.pack is not None:
        cases = {arguments.pack.name: (lambda: arguments.pack, arguments.ram)}
    print(machine())
    rows = [
        measured(name, pack(), ram, arguments)
        for name, (pack, ram) in cases.items()
        if name.startswith(arguments.only or "")
    ]
    header = ["model", "hits", "step, ms", "recorded", "processor, ms", "recorded", "bytes a layer and token"]
    print_table(header, rows)


if __name__ == "__main__":
    main()
