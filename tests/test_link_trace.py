"""Copies to a device in the trace of a whole model, on a fake one."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_cuda_model import Load, loading_on_fake_devices, tier_of
from loaded_models import make_pack, wait_for_loads

from moe_offload.cache import CopyKind, read_trace
from moe_offload.offload.profiling.analyse import analyse
from moe_offload.offload.tiers import link_meter

SLOT_BYTES = 16384


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("links"), "mixtral")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    monkeypatch.setattr(link_meter, "LEAST_BYTES", 1)
    with loading_on_fake_devices(monkeypatch) as load:
        yield load


def test_every_copy_is_in_the_trace_and_the_report(pack: Path, load: Load, tmp_path: Path):
    model = load(pack, slots_bytes=2 * SLOT_BYTES, host_bytes=12 * SLOT_BYTES, prefetch=1, warm_start=False)
    model.generate("w1 w2 w3", max_new_tokens=3)
    wait_for_loads(model)
    before = model.stats
    with model.tracing(tmp_path / "run.npz") as recording:
        model.generate("w1 w2 w3", max_new_tokens=12)
        wait_for_loads(model)
    after, answer = model.stats, model.last_run
    trace = read_trace(tmp_path / "run.npz")
    assert recording.trace.copy_bytes.tolist() == trace.copy_bytes.tolist()
    copied = after.bytes_copied - before.bytes_copied
    assert trace.copy_bytes.sum() == copied > 0
    ahead = after.bytes_copied_ahead - before.bytes_copied_ahead
    assert trace.copy_bytes[trace.copy_kind == CopyKind.AHEAD].sum() == ahead
    assert set(trace.copy_device.tolist()) == {0}
    known = trace.copy_ns > 0
    assert known.mean() > 0.5, "all but what was under way at the end"
    np.testing.assert_array_equal(trace.copy_ns[known], trace.copy_bytes[known])  # the fake's nanosecond a byte
    np.testing.assert_allclose(trace.link_bytes_per_s, [1e9], rtol=1e-6)

    assert 0 < answer.bytes_copied <= copied, "the rest was prefetched, and came later"
    assert answer.link_peak_bytes_per_s == pytest.approx(1e9)
    assert 0 < answer.link_busy_s <= copied * 1e-9
    assert len(answer.link_use_steps) == answer.new_tokens - 1
    assert all(share >= 0 for share in answer.link_use_steps)

    report = analyse(trace)
    assert sum(report.steps.copied_demand_bytes) + sum(report.steps.copied_ahead_bytes) == copied
    assert report.link.gpus[0].demand_bytes == trace.copy_bytes[trace.copy_kind == CopyKind.DEMAND].sum()
    assert not tier_of(model).queues[0].hazards


def test_nobody_is_told_once_the_recording_has_ended(pack: Path, load: Load):
    model = load(pack, slots_bytes=0, host_bytes=12 * SLOT_BYTES, warm_start=False)
    with model.tracing() as recording:
        model.generate("w1 w2", max_new_tokens=3)
    assert len(recording.trace.copy_bytes)
    model.generate("w3 w4", max_new_tokens=3)
    assert not recording._recorder.copies.take()
    assert tier_of(model).queues[0].link._observer is None
