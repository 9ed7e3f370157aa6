"""The export for Perfetto: the trace-event format's rules hold, and all times are there."""

import json
from collections import defaultdict

import numpy as np
import pytest

from moe_offload.cache import RoutingTrace
from moe_offload.errors import ConfigError
from moe_offload.offload.tracing.chrome_trace import chrome_events, lanes, write_chrome_trace

STEPS, LAYERS, READS, COPIES = 6, 3, 40, 30


def some_trace(seed=0):
    rng = np.random.default_rng(seed)
    layer_us = rng.integers(0, 50, (STEPS, LAYERS, 4)).astype(np.uint32)
    step_us = (layer_us.sum(axis=(1, 2)) + rng.integers(0, 30, STEPS)).astype(np.uint32)
    begin = np.concatenate([[0], np.cumsum(step_us)[:-1]]).astype(np.int64) + 1000
    begin[3] -= 40  # another thread's step overlaps
    read_begin = rng.integers(0, 3000, READS)
    return RoutingTrace(
        experts=rng.integers(0, 8, (STEPS + 4, LAYERS, 2)),
        outcome=rng.integers(0, 5, (STEPS + 4, LAYERS, 2)),
        phase=np.array([0] * 5 + [1] * (STEPS - 1)),
        sequence=np.zeros(STEPS + 4, int),
        step=np.array([0] * 5 + list(range(1, STEPS))),
        step_begin_us=begin,
        step_us=step_us,
        step_tokens=np.array([5] + [1] * (STEPS - 1)),
        layer_us=layer_us,
        transfer_layer=rng.integers(0, LAYERS, READS),
        transfer_expert=rng.integers(0, 8, READS),
        transfer_begin_us=read_begin,
        transfer_end_us=read_begin + rng.integers(0, 400, READS),
        transfer_bytes=rng.integers(1, 1 << 20, READS),
        transfer_kind=rng.integers(0, 4, READS),
        copy_device=rng.integers(0, 2, COPIES),
        copy_begin_us=rng.integers(0, 3000, COPIES),
        copy_ns=rng.integers(0, 200_000, COPIES),
        copy_bytes=rng.integers(1, 1 << 20, COPIES),
        copy_kind=rng.integers(0, 2, COPIES),
        link_bytes_per_s=np.array([1e10, 2e10]),
    )


def by_track(events):
    tracks = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            tracks[event["pid"], event["tid"]].append(event)
    return tracks


def test_the_file_is_what_the_format_asks_for(tmp_path):
    path = tmp_path / "trace.json"
    write_chrome_trace(path, some_trace())
    whole = json.loads(path.read_text())
    assert whole["displayTimeUnit"] == "ms"
    named = set()
    for event in whole["traceEvents"]:
        assert event["ph"] in "XMC"
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        if event["ph"] == "M":
            if event["name"] == "thread_name":
                named.add((event["pid"], event["tid"]))
            continue
        assert isinstance(event["ts"], int)
        if event["ph"] == "C":
            assert all(value >= 0 for value in event["args"].values())
            continue
        assert isinstance(event["dur"], int)
        assert event["dur"] >= 0
        assert isinstance(event["cat"], str)
    assert named == by_track(whole["traceEvents"]).keys()
    assert [file.name for file in tmp_path.iterdir()] == ["trace.json"]


@pytest.mark.parametrize("seed", range(5))
def test_events_of_a_track_nest_and_begin_in_order(seed):
    for events in by_track(chrome_events(some_trace(seed))).values():
        assert [event["ts"] for event in events] == sorted(event["ts"] for event in events)
        open_until = []
        for event in events:
            end = event["ts"] + event["dur"]
            while open_until and open_until[-1] <= event["ts"]:
                open_until.pop()
            assert not open_until or end <= open_until[-1]
            open_until.append(end)


def test_all_times_are_there():
    trace = some_trace()
    events = [event for event in chrome_events(trace) if event["ph"] == "X"]
    steps = [event for event in events if event["cat"] == "step"]
    assert sum(event["dur"] for event in steps) == trace.step_us.sum()
    assert sorted(event["name"] for event in steps) == ["decode"] * (STEPS - 1) + ["prompt"]
    for name, column in (("dense", 0), ("router", 1), ("wait", 2), ("experts", 3)):
        total = sum(event["dur"] for event in events if event["cat"] == "part" and event["name"] == name)
        assert total == trace.layer_us[..., column].sum()
    reads = [event for event in events if "bytes" in event.get("args", {})]
    assert sum(event["args"]["bytes"] for event in reads) == trace.transfer_bytes.sum(dtype=np.int64)
    assert {event["pid"] for event in reads}.isdisjoint(event["pid"] for event in steps)


def test_copies_and_what_a_step_sent():
    trace = some_trace()
    events = list(chrome_events(trace))
    copies = [event for event in events if event.get("cat") == "copy"]
    assert sum(event["args"]["copied"] for event in copies) == trace.copy_bytes.sum(dtype=np.int64)
    counters = defaultdict(list)
    for event in events:
        if event["ph"] == "C":
            counters[event["name"]].append(event)
    assert set(counters) == {"GPU 0, GB/s", "GPU 1, GB/s"}
    inside = trace.copy_begin_us >= trace.step_begin_us.min()
    for device, found in enumerate(counters.values()):
        assert [event["ts"] for event in found] == sorted(event["ts"] for event in found)
        assert found[-1]["args"] == {"demand": 0, "ahead": 0}
        for kind, name in enumerate(("demand", "ahead")):
            # Every step has one value, which times its duration is what was sent in it.
            steps = [e for e in found if e["ts"] in trace.step_begin_us]
            durations = [trace.step_us[trace.step_begin_us == e["ts"]][0] for e in steps]
            sent = sum(e["args"][name] * 1000 * us for e, us in zip(steps, durations, strict=True))
            expected = trace.copy_bytes[inside & (trace.copy_device == device) & (trace.copy_kind == kind)]
            assert sent == pytest.approx(expected.sum(dtype=np.int64), rel=1e-3)


def test_lanes_are_as_few_as_can_be():
    begin, end = np.array([0, 1, 2, 5, 5]), np.array([5, 3, 4, 9, 6])
    assert lanes(begin, end).tolist() == [0, 1, 2, 0, 1]
    assert lanes(np.zeros(0, int), np.zeros(0, int)).tolist() == []


def test_what_has_no_times_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="the trace has no times"):
        write_chrome_trace(tmp_path / "trace.json", RoutingTrace(np.zeros((1, 1, 1), int)))
    with pytest.raises(ConfigError, match="cannot be written"):
        write_chrome_trace(tmp_path / "none" / "trace.json", some_trace())
    assert not list(tmp_path.iterdir())
