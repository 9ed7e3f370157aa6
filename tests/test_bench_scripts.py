"""The benchmarks that put the runtime's parts together by themselves still fit them."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import bench_graph_step
import bench_layer
from disk_timeline import Pace


@pytest.mark.parametrize("one_call", [True, False])
def test_a_layer_of_slots_computes(one_call: bool):
    layer = bench_layer.Layer("nf4", (64, 96, 2, bench_layer.SWIGLU), slots_bytes=1 << 16)
    results = [step() for step in layer.steps(one_call=one_call)]
    assert len(results) == layer.num_experts // layer.top_k >= 2
    assert all(isinstance(result, torch.Tensor) and result.shape == (1, 64) for result in results)
    assert float(results[0].abs().max()) > 0


def test_a_recorded_step_runs_without_a_device():
    step, residency, _, _ = bench_graph_step._step(2, 4, 2, 1)
    lookahead = bench_graph_step._lookahead(residency, 2, 4, 2)
    assert not step.run_by_layers(residency, lookahead)
    assert sum(layer.decode.hits for layer in residency.cache.stats.snapshot().layers) == 4
    assert lookahead._pass.predicted == {}
    assert not lookahead.foresaw_misses()


def test_a_paced_disk_reads_one_after_the_other_and_gives_nothing_back():
    pace = Pace(10.0)
    assert pace.end_of(1.0, 5) == 1.5
    assert pace.end_of(1.1, 10) == 2.5  # behind the first
    assert pace.end_of(9.0, 10) == 10.0  # after a pause, as if there had been none
