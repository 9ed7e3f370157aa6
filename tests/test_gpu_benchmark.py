"""The benchmark of GPUs: all of it that needs none."""

import json
from pathlib import Path

import gpu
import pytest
import torch


def test_every_variant_changes_one_thing():
    lines = list(gpu.cases(["8GiB"], ["uniform", "trace-like"], gpu.VARIANTS, "cuda"))
    assert len(lines) == 2 * 6 + 1
    assert len(set(lines)) == len(lines)
    assert {case.miss_path for case in lines} == {"copy", "cpu", "split", "auto"}
    assert [case.engine for case in lines].count("accelerate") == 1


def test_tokens_drawn_evenly_share_what_is_left_to_chance():
    assert gpu.routing_spec("uniform", 8, 2) == f"synthetic:first=0.2500,any={13 / 28:.4f}"
    assert gpu.routing_spec("trace-like", 8, 2) == "synthetic:mixtral"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]):
    assert gpu.main([]) == 1
    assert "no CUDA device" in capsys.readouterr().err


def test_it_runs_on_a_small_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--device", "cpu", "--like", "olmoe-1b-7b", "--layers", "1", "--experts", "8", "--top-k", "2"]
    arguments += [
        "--vocab",
        "256",
        "--caps",
        "600MiB",
        "--routing",
        "trace-like",
        "--variants",
        "--tokens",
        "3",
        "--warmup",
        "2",
        "--rate-bytes",
        "4096",
    ]
    assert gpu.main([*arguments, "--pack", str(tmp_path / "pack"), "--output", str(tmp_path / "gpu.json")]) == 0
    (line,) = json.loads((tmp_path / "gpu.json").read_text())["lines"]
    assert "error" not in line["figures"], line
    assert line["figures"]["tokens_per_s"] > 0
    assert 0 <= line["figures"]["hit_ratio"] <= 1
    assert "| 600MiB | trace-like | copy, prefetch auto, graphs auto |" in capsys.readouterr().out
