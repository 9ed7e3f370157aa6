"""The times of a trace for Perfetto and chrome://tracing: JSON in the trace-event format.

https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU (the format's description): complete
events (``ph: "X"``) with times in microseconds, those of one track nest and do not overlap otherwise; and counters
(``ph: "C"``), whose value holds until the next.
"""

import heapq
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moe_offload.cache import CopyKind, Outcome, RoutingTrace, TransferKind
from moe_offload.cache.trace import LAYER_TIMES, Array
from moe_offload.errors import ConfigError

_COMPUTE, _DISK, _LINKS = 1, 2, 3  # "processes": groups of tracks
_KIND_NAMES = {
    TransferKind.DEMAND: "demand",
    TransferKind.USED: "prefetch, used",
    TransferKind.WASTED: "prefetch, wasted",
    TransferKind.WARM: "warm start",
}
_COPY_NAMES = {CopyKind.DEMAND: "demand", CopyKind.AHEAD: "ahead"}
Event = dict[str, Any]


def write_chrome_trace(path: str | os.PathLike[str], trace: RoutingTrace) -> None:
    """Write what `chrome_events` gives as a JSON object; ConfigError if there are no times, or no such file can be."""
    target = Path(path)
    partial = target.with_name(f"{target.name}.{os.getpid()}.writing")
    try:
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write('{"displayTimeUnit": "ms", "traceEvents": [')
                for index, event in enumerate(chrome_events(trace)):
                    file.write((",\n" if index else "\n") + json.dumps(event))
                file.write("\n]}\n")
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error


def chrome_events(trace: RoutingTrace) -> Iterator[Event]:
    """Forward passes with their layers, reads from the disk, as many tracks as were busy at once, and links to GPUs.

    A trace tells of a layer how long its parts took, not when each began: they are drawn one after the other from the
    beginning of their pass, and what is not the layers' comes last.
    """
    if trace.step_us is None or trace.step_begin_us is None:
        raise ConfigError("the trace has no times; record one with --trace FILE")
    steps = lanes(trace.step_begin_us, trace.step_begin_us + trace.step_us)
    yield from _tracks(_COMPUTE, "computing", "forward passes", steps)
    for step in np.argsort(trace.step_begin_us, kind="stable").tolist():
        yield from _step(trace, step, int(steps[step]) + 1)
    if trace.transfer_begin_us is not None and trace.transfer_end_us is not None:
        reads = lanes(trace.transfer_begin_us, trace.transfer_end_us)
        yield from _tracks(_DISK, "disk", "reads", reads)
        for index in np.argsort(trace.transfer_begin_us, kind="stable").tolist():
            yield _read(trace, index, int(reads[index]) + 1)
    if trace.copy_device is not None and len(trace.copy_device):
        yield from _links(trace)


def lanes(begin: Array, end: Array) -> Array:
    """For each of the intervals the lowest track on which nothing else is at that time."""
    lane = np.zeros(len(begin), np.int64)
    busy: list[tuple[int, int]] = []  # until when, which
    free: list[int] = []
    for index in np.argsort(begin, kind="stable").tolist():
        while busy and busy[0][0] <= begin[index]:
            heapq.heappush(free, heapq.heappop(busy)[1])
        lane[index] = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (int(end[index]), int(lane[index])))
    return lane


def _tracks(pid: int, group: str, track: str, lane: Array, first: int = 1) -> Iterator[Event]:
    yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": group}}
    yield {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}}
    for tid in range(1, int(lane.max(initial=-1)) + 2):
        name = f"{track} {tid - 1 + first}"
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}}


def _complete(name: str, category: str, track: tuple[int, int], begin_us: int, duration_us: int, **args: Any) -> Event:
    pid, tid = track
    event = {"ph": "X", "name": name, "cat": category, "pid": pid, "tid": tid, "ts": begin_us, "dur": duration_us}
    return event | {"args": args} if args else event


def _step(trace: RoutingTrace, step: int, tid: int) -> Iterator[Event]:
    assert trace.step_begin_us is not None
    assert trace.step_us is not None
    assert trace.step is not None
    track, begin, duration = (_COMPUTE, tid), int(trace.step_begin_us[step]), int(trace.step_us[step])
    tokens = np.flatnonzero(trace.step == step)
    name = "decode"
    if trace.phase is not None and len(tokens) and trace.phase[tokens[0]] == 0:
        name = "prompt"
    sequence = int(trace.sequence[tokens[0]]) if trace.sequence is not None and len(tokens) else None
    yield _complete(name, "step", track, begin, duration, step=step, tokens=len(tokens), sequence=sequence)
    if trace.layer_us is None:
        return
    end = begin + duration
    for layer_idx, times in enumerate(trace.layer_us[step].tolist()):
        total = min(sum(times), end - begin)
        if not total:
            continue
        yield _complete(f"layer {layer_idx}", "layer", track, begin, total, **_experts(trace, tokens, layer_idx))
        layer_end = begin + total
        for part, part_us in zip(LAYER_TIMES, times, strict=True):
            part_us = min(part_us, layer_end - begin)
            if part_us:
                yield _complete(part, "part", track, begin, part_us)
            begin += part_us


def _experts(trace: RoutingTrace, tokens: Array, layer_idx: int) -> dict[str, Any]:
    """Of a single token what it chose; of any, how many were missed."""
    args: dict[str, Any] = {}
    if len(tokens) == 1:
        args["experts"] = [e for e in trace.experts[tokens[0], layer_idx].tolist() if e >= 0]
    if trace.outcome is not None and len(tokens):
        missed = np.isin(trace.outcome[tokens, layer_idx], (Outcome.MISSED, Outcome.BYPASSED))
        args["missed"] = len(np.unique(trace.experts[tokens, layer_idx][missed]))
    return args


def _read(trace: RoutingTrace, index: int, tid: int) -> Event:
    assert trace.transfer_begin_us is not None
    assert trace.transfer_end_us is not None
    assert trace.transfer_layer is not None
    assert trace.transfer_expert is not None
    assert trace.transfer_bytes is not None
    assert trace.transfer_kind is not None
    begin, end = int(trace.transfer_begin_us[index]), int(trace.transfer_end_us[index])
    layer_idx, expert_idx = int(trace.transfer_layer[index]), int(trace.transfer_expert[index])
    return _complete(
        f"layer {layer_idx} expert {expert_idx}",
        _KIND_NAMES.get(int(trace.transfer_kind[index]), "read"),  # type: ignore[call-overload]
        (_DISK, tid),
        begin,
        max(0, end - begin),
        bytes=int(trace.transfer_bytes[index]),
        kind=_KIND_NAMES.get(int(trace.transfer_kind[index])),  # type: ignore[call-overload]
    )


def _links(trace: RoutingTrace) -> Iterator[Event]:
    """What each GPU was sent: its copies on a track, and for each step the rate of both kinds, as a counter.

    A copy is drawn from when it was enqueued, or when the one before it was over: a stream makes one after the other.
    """
    assert trace.copy_device is not None
    assert trace.copy_begin_us is not None
    assert trace.copy_ns is not None
    assert trace.copy_bytes is not None
    assert trace.copy_kind is not None
    yield from _tracks(_LINKS, "links", "copies to GPU", trace.copy_device.astype(np.int64), first=0)
    free_us: dict[int, int] = {}
    for index in np.argsort(trace.copy_begin_us, kind="stable").tolist():
        device, duration_us = int(trace.copy_device[index]), int(trace.copy_ns[index]) // 1000
        begin_us = max(int(trace.copy_begin_us[index]), free_us.get(device, 0))
        free_us[device] = begin_us + duration_us
        kind = _COPY_NAMES[CopyKind(int(trace.copy_kind[index]))]
        num_bytes = int(trace.copy_bytes[index])
        yield _complete(kind, "copy", (_LINKS, device + 1), begin_us, duration_us, copied=num_bytes)
    yield from _counters(trace)


def _counters(trace: RoutingTrace) -> Iterator[Event]:
    """GB/s that each link carried in each step, as if evenly."""
    assert trace.copy_device is not None
    assert trace.copy_begin_us is not None
    assert trace.copy_bytes is not None
    assert trace.copy_kind is not None
    assert trace.step_begin_us is not None
    assert trace.step_us is not None
    step = trace.step_at(trace.copy_begin_us)
    for device in range(int(trace.copy_device.max()) + 1):
        sums = np.zeros((len(trace.step_us), len(CopyKind)))
        mine = (trace.copy_device == device) & (step >= 0)
        np.add.at(sums, (step[mine], trace.copy_kind[mine]), trace.copy_bytes[mine])
        rates = sums / np.maximum(trace.step_us, 1)[:, None] / 1000
        end_us = None
        for index in np.argsort(trace.step_begin_us, kind="stable").tolist():
            begin_us = int(trace.step_begin_us[index])
            if end_us is not None and end_us < begin_us:
                yield _counter(device, end_us, np.zeros(len(CopyKind)))
            yield _counter(device, begin_us, rates[index])
            end_us = begin_us + int(trace.step_us[index])
        if end_us is not None:
            yield _counter(device, end_us, np.zeros(len(CopyKind)))


def _counter(device: int, time_us: int, rates: Array) -> Event:
    values = {name: round(float(rates[kind]), 4) for kind, name in _COPY_NAMES.items()}
    return {"ph": "C", "name": f"GPU {device}, GB/s", "pid": _LINKS, "tid": 0, "ts": time_us, "args": values}
