"""When the disk was read while tokens were decoded, and what the run was doing while it was not.

With --disk-rate reads wait until a disk of that rate would be done with them, one after the other: a slower disk, which
gives nothing back for the time in which it was not asked (a control group's limit does, see docs/benchmarks.md).
"""

import argparse
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any

from moe_offload.offload.streaming.disk import Disk, DiskFile

Span = tuple[float, float]


@dataclass
class DiskTimeline:
    """Spans of time: reads, layers' experts from asked for to summed, and computing within them."""

    reads: list[Span] = field(default_factory=list)
    layers: list[Span] = field(default_factory=list)
    computing: list[Span] = field(default_factory=list)

    def watch(self, model: Any, pace: "Pace | None" = None) -> None:
        """Follow an `OffloadedModel` from now on, on a disk that is slowed down to ``pace``."""
        residency = model._residency
        files = residency._tier._reader._files
        files._disk = _WatchedDisk(files._disk, self.reads, pace)
        files._entries.clear()  # nothing has been read yet, or what was opened is opened again
        run, compute = residency._step, residency._compute
        residency._step = MethodType(lambda _, *args, **kwargs: self._timed(self.layers, run, args, kwargs), residency)
        residency._compute = MethodType(
            lambda _, *args, **kwargs: self._timed(self.computing, compute, args, kwargs), residency
        )

    @staticmethod
    def _timed(spans: list[Span], call: Any, args: Any, kwargs: Any) -> Any:
        begin_s = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            spans.append((begin_s, time.perf_counter()))

    def shares(self, begin_s: float, end_s: float) -> dict[str, float]:
        """Shares of the time from ``begin_s`` to ``end_s``.

        ``busy``: at least one read was under way. The rest by what ran meanwhile: ``idle_dense`` outside of experts,
        ``idle_computing`` experts, ``idle_waiting`` neither (between asking and the disk's first byte, and wake-ups).
        """
        busy, layers, computing = (
            _union(_clip(spans, begin_s, end_s)) for spans in (self.reads, self.layers, self.computing)
        )
        whole_s = end_s - begin_s
        busy_s, idle_in_layers_s = _length(busy), _length(layers) - _overlap(layers, busy)
        idle_computing_s = _length(computing) - _overlap(computing, busy)
        return {
            "busy": busy_s / whole_s,
            "idle_dense": (whole_s - busy_s - idle_in_layers_s) / whole_s,
            "idle_computing": idle_computing_s / whole_s,
            "idle_waiting": (idle_in_layers_s - idle_computing_s) / whole_s,
            "computing": _length(computing) / whole_s,
            "dense": (whole_s - _length(layers)) / whole_s,
        }


class Pace:
    """When a disk of a rate, which reads one thing after the other, would be done."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at_s = 0.0
        self._lock = threading.Lock()

    def end_of(self, begin_s: float, num_bytes: int) -> float:
        """Of a read that was asked for at ``begin_s``; those asked for before go first."""
        with self._lock:
            self._free_at_s = max(self._free_at_s, begin_s) + num_bytes / self._bytes_per_s
            return self._free_at_s


class _WatchedDisk:
    def __init__(self, disk: Disk, spans: list[Span], pace: Pace | None) -> None:
        self._disk, self._spans, self._pace = disk, spans, pace

    def open(self, path: Path) -> DiskFile:
        return _WatchedFile(self._disk.open(path), self._spans, self._pace)


class _WatchedFile:
    def __init__(self, file: DiskFile, spans: list[Span], pace: Pace | None) -> None:
        self._file, self._spans, self._pace = file, spans, pace
        self.close = file.close

    def pread_into(self, into: memoryview, offset_bytes: int) -> int:
        begin_s = time.perf_counter()
        end_s = begin_s if self._pace is None else self._pace.end_of(begin_s, len(into))
        try:
            return self._file.pread_into(into, offset_bytes)
        finally:
            time.sleep(max(0.0, end_s - time.perf_counter()))
            self._spans.append((begin_s, time.perf_counter()))


def _clip(spans: Iterable[Span], begin_s: float, end_s: float) -> list[Span]:
    return [(max(a, begin_s), min(b, end_s)) for a, b in spans if b > begin_s and a < end_s]


def _union(spans: list[Span]) -> list[Span]:
    merged: list[Span] = []
    for begin_s, end_s in sorted(spans):
        if merged and begin_s <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end_s))
        else:
            merged.append((begin_s, end_s))
    return merged


def _length(spans: list[Span]) -> float:
    return sum(end_s - begin_s for begin_s, end_s in spans)


def _overlap(first: list[Span], second: list[Span]) -> float:
    """Of two lists of disjoint spans in order."""
    total_s, index = 0.0, 0
    for begin_s, end_s in first:
        while index < len(second) and second[index][1] <= begin_s:
            index += 1
        at = index
        while at < len(second) and second[at][0] < end_s:
            total_s += min(end_s, second[at][1]) - max(begin_s, second[at][0])
            at += 1
    return total_s


def main() -> None:
    """Decode random tokens and print a line for each setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--ram", required=True)
    parser.add_argument("--prefetch", nargs="+", default=["off", "1"], help="off, auto or numbers of layers")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--disk-rate", metavar="RATE", help="slow reads down to so much a second, like 0.8GB/s")
    options = parser.parse_args()

    import torch

    from moe_offload import OffloadedModel
    from moe_offload.offload.planning.sizes import parse_rate

    rate = None if options.disk_rate is None else parse_rate(options.disk_rate)
    for prefetch in options.prefetch:
        setting = int(prefetch) if prefetch.isdecimal() else prefetch
        with OffloadedModel.from_pretrained(
            options.pack, device="cpu", ram=options.ram, prefetch=setting, warm_start=False
        ) as model:
            timeline = DiskTimeline()
            timeline.watch(model, None if rate is None else Pace(rate))
            vocab = model.model.config.vocab_size
            prompt = torch.randint(3, vocab, (1, 32), generator=torch.Generator().manual_seed(0))
            times_s: list[float] = []
            counts: list[Any] = []

            def mark(*_: Any, model: Any = model, times_s: list[float] = times_s, counts: list[Any] = counts) -> None:
                times_s.append(time.perf_counter())
                counts.append(model._meter.read())

            model.model.register_forward_pre_hook(mark)
            count = options.tokens + 10  # the first few still fill slots
            model.model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False)
            mark()
            begin, end = -1 - options.tokens, -1
            report = model._meter.between(counts[begin], counts[end])
            shares = timeline.shares(times_s[begin], times_s[end])
        step_s = (times_s[end] - times_s[begin]) / options.tokens
        line = f"prefetch {prefetch}: {1 / step_s:.2f} tok/s, "
        if rate is not None:  # of 1 / (bytes missed / disk rate)
            missed_bytes = (report.bytes_read - report.prefetch_wasted_bytes) / options.tokens
            line += f"{missed_bytes / rate / step_s:.0%} of the disk's bound, "
        print(line + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()), flush=True)


if __name__ == "__main__":
    main()
