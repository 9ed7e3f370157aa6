"""moe-offload replay, on small traces."""

import json
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from replay_traces import random_trace

from moe_offload.cache import EventKind, RoutingTrace, write_trace
from moe_offload.cache.replay import replay
from moe_offload.cache.replay_timing import Lookahead, Rates
from moe_offload.cli.main import cli


@pytest.fixture
def trace_file(tmp_path):
    def write(name: str = "run", **options) -> str:
        path = tmp_path / f"{name}.npz"
        write_trace(path, random_trace(**{"seed": 1, "num_experts": 16, **options}))
        return str(path)

    return write


def shown(*args: str) -> str:
    result = CliRunner().invoke(cli, ["replay", *args])
    assert result.exit_code == 0, result.output
    return result.stdout


def figures(*args: str) -> list[dict]:
    found = json.loads(shown(*args, "--json", "-"))
    assert found["version"] == 1
    return found["traces"]


def test_a_table_has_a_line_for_each_policy_and_size(trace_file):
    path = trace_file(prompt_tokens=20, num_sequences=3)
    text = shown(path, "--slots", "25%", "--slots", "8", "--policy", "decay", "--policy", "belady")
    assert "run: 200 tokens of 3 texts, 2 layers of 16 experts, 3 a token" in text
    lines = [line.split() for line in text.splitlines() if "%)" in line]
    assert [(line[0], line[1], line[2]) for line in lines] == [
        ("decay", "4", "(25%)"),
        ("belady", "4", "(25%)"),
        ("decay", "8", "(50%)"),
        ("belady", "8", "(50%)"),
    ]
    assert "prompt hits" in text
    assert [line[-1] for line in lines if line[0] == "belady"] == ["1.00", "1.00"]


def test_the_figures_are_those_of_the_python_interface(trace_file):
    trace = random_trace(1, num_experts=16, expert_bytes=np.array([1 << 20, 2 << 20]))
    path = trace_file(expert_bytes=trace.expert_bytes)
    options = ["--disk", "3GB/s", "--pcie", "1GB/s", "--layer-ms", "2", "--prefetch-recall", "0.8"]
    (found,) = figures(path, "--slots", "5", "--policy", "decay", *options)
    (row,) = found["rows"]
    rates = Rates(1e9, before_s=1e-3, experts_s=1e-3)
    result = replay(trace, policy="decay", num_slots=5, rates=rates, lookahead=Lookahead(0.8))
    assert (row["decode"]["hits"], row["slots"]) == (result.stats.decode.hits, [5, 5])
    assert row["bytes_per_token"] == result.bytes_per_token
    assert row["seconds_per_token"] == result.seconds_per_token
    lru, best = (replay(trace, policy=name, num_slots=5).stats.decode.hits for name in ("lru", "belady"))
    assert row["gap_closed"] == (result.stats.decode.hits - lru) / (best - lru)
    text = shown(path, "--slots", "5", "--policy", "decay", *options)
    assert f"{1000 * result.seconds_per_token:.1f}" in text.split()
    assert "experts come at 1.00 GB/s, 80% of the missing foreseen" in text


def test_sizes_are_those_of_the_run(trace_file):
    (found,) = figures(trace_file(num_slots=np.array([4, 7])), "--policy", "lru")
    assert [row["slots"] for row in found["rows"]] == [[4, 7]]
    (found,) = figures(trace_file(), "--policy", "lru")
    assert [row["slots"] for row in found["rows"]] == [[4, 4], [8, 8]]


def test_a_pool_stands_beside_the_layers(trace_file):
    (found,) = figures(trace_file(), "--slots", "4", "--pool", "--policy", "lru")
    assert [row["pool_slots"] for row in found["rows"]] == [None, 8]
    assert "8 in a pool" in shown(trace_file(), "--slots", "4", "--pool")


def test_curves_go_up_to_all_experts_and_mark_the_knee(trace_file):
    path = trace_file(num_tokens=400)
    (found,) = figures(path, "--curve", "--policy", "lru", "--policy", "belady")
    lru, best = found["curves"]
    assert (lru["policy"], lru["slots"][0], lru["slots"][-1]) == ("lru", 3, 16)
    assert lru["hit_ratio"][-1] == best["hit_ratio"][-1]
    assert lru["knee_slots"] in lru["slots"]
    assert shown(path, "--curve", "--policy", "lru").count("knee ") == 1


def test_several_traces_end_in_the_mean(trace_file):
    paths = [trace_file("one"), trace_file("two", seed=2)]
    rows = [row for each in figures(*paths, "--policy", "decay") for row in each["rows"]]
    mean = sum(row["gap_closed"] for row in rows) / len(rows)
    assert f"closed, on average: decay {mean:.2f}" in shown(*paths, "--policy", "decay")


def test_a_prompt_alone_is_counted_as_what_it_is(trace_file):
    (found,) = figures(trace_file(num_tokens=10, prompt_tokens=10), "--policy", "lru", "--slots", "4")
    assert (found["rows"][0]["phase"], found["rows"][0]["bytes_per_token"]) == ("prefill", None)


def test_what_is_left_out_of_a_run_is_said(tmp_path):
    path = tmp_path / "warm.npz"
    kinds = [EventKind.RESIDENT, EventKind.NEW_SEQUENCE, EventKind.ACQUIRE, EventKind.WARM, EventKind.LOADED]
    events = {
        "event_kind": np.array(kinds, np.uint8),
        "event_layer": np.zeros(5, np.int16),
        "event_token": np.zeros(5, np.int32),
        "event_size": np.array([1, 0, 2, 1, 1]),
        "event_experts": np.array([3, 0, 1, 2, 2]),
        "event_weights": np.full(5, np.nan, np.float32),
    }
    write_trace(path, RoutingTrace(experts=np.zeros((1, 1, 2), np.int16), num_experts=np.array([4]), **events))
    text = shown(str(path), "--slots", "2", "--policy", "lru")
    assert "also told of other things (warm, resident), which are left out" in " ".join(text.split())


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["nowhere.npz"], 1, "nowhere.npz cannot be read: No such file"),
        ([], 2, "Missing argument 'TRACE...'"),
        (["RUN", "--slots", "0"], 2, "'0' is not a number of slots; write 16, or 25% of the experts"),
        (["RUN", "--slots", "2.5"], 2, "'2.5' is not a number of slots"),
        (["RUN", "--slots", "120%"], 2, "'120%' is not a number of slots"),
        (["RUN", "--policy", "fifo"], 2, "'fifo' is not one of"),
        (["RUN", "--prefetch-recall", "0.5"], 2, "--prefetch-recall needs a rate: give --disk, --pcie or both"),
        (["RUN", "--disk", "3GB/s"], 2, "add --expert-size, like 6MiB"),
        (["RUN", "--disk", "fast"], 2, "is not a rate"),
    ],
)
def test_wrong_usage_says_what_to_do(trace_file, args, status, message):
    args = [trace_file() if arg == "RUN" else arg for arg in args]
    result = CliRunner().invoke(cli, ["replay", *args])
    assert result.exit_code == status
    assert message in " ".join(result.output.split())


def test_a_trace_without_experts_is_an_error(tmp_path):
    path = tmp_path / "empty.npz"
    write_trace(path, RoutingTrace(experts=np.full((3, 2, 2), -1, np.int16)))
    result = CliRunner().invoke(cli, ["replay", str(path)])
    assert result.exit_code == 1
    assert "names no experts: there is nothing to replay" in result.stderr


def test_torch_is_not_waited_for(trace_file):
    script = f"""
import sys
from moe_offload.cli.main import run
assert run(["replay", {trace_file()!r}, "--curve"]) == 0
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
