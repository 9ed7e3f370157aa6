"""Traces that are streamed to disk: what is whole after a crash is read, whatever the moment of it."""

import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from moe_offload.cache import read_trace
from moe_offload.cache.trace_frames import encode_frame, file_header, pack_arrays
from moe_offload.cache.trace_writer import TraceWriter
from moe_offload.errors import ConfigError

LAYERS, TOP_K = 3, 2


def block(first, count, seed=0):
    """Some tokens of which each is a step of its own."""
    rng = np.random.default_rng([seed, first])
    return {
        "experts": rng.integers(-1, 8, (count, LAYERS, TOP_K)).astype(np.int16),
        "sequence": np.zeros(count, np.int32),
        "step": np.arange(first, first + count, dtype=np.int32),
        "step_begin_us": (10**10 + 1000 * np.arange(first, first + count)).astype(np.int64),
        "step_us": rng.integers(900, 1000, count).astype(np.uint32),
        "step_tokens": np.ones(count, np.int32),
    }


def write_some(path, num_blocks):
    """What a child does that is killed."""
    writer = TraceWriter(path)
    for index in range(num_blocks):
        writer.write(block(10 * index, 10), {"blocks": index + 1})
        print(index + 1, flush=True)
    return writer


def test_frames_become_one_file(tmp_path):
    writer = write_some(tmp_path / "some.npz", 3)
    assert [path.name for path in tmp_path.iterdir()] == ["some.npz.partial"]
    early = read_trace(tmp_path / "some.npz.partial")
    writer.close()
    writer.close()
    trace = read_trace(tmp_path / "some.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["some.npz"]
    assert trace.meta["blocks"] == early.meta["blocks"] == 3
    for name, array in early.arrays().items():
        np.testing.assert_array_equal(getattr(trace, name), array)
        np.testing.assert_array_equal(array, np.concatenate([block(10 * index, 10)[name] for index in range(3)]))


def test_pieces_that_know_less_are_padded(tmp_path):
    writer = TraceWriter(tmp_path / "some.npz")
    more = block(0, 2) | {
        "experts": np.ones((2, LAYERS, 3), np.int16),
        "probs": np.ones((2, LAYERS, 3), np.float16),
        "predicted": np.ones((2, LAYERS, 2, 4), np.int16),
    }
    writer.write({"num_experts": np.full(LAYERS, 8, np.int32)})
    writer.write(block(2, 1))
    writer.write(more)
    writer.close()
    trace = read_trace(tmp_path / "some.npz")
    assert trace.experts.shape == trace.probs.shape == (3, LAYERS, 3)
    assert trace.experts[0, :, 2].tolist() == [-1] * LAYERS
    assert trace.probs[0].tolist() == [[0.0] * 3] * LAYERS
    assert (trace.predicted[0] == -1).all()
    assert (trace.predicted[1:] == 1).all()
    assert trace.distance.tolist() == [1, 2]


def test_a_trace_of_nothing_can_be_read(tmp_path):
    writer = TraceWriter(tmp_path / "some.npz")
    writer.write({"num_experts": np.full(LAYERS, 8, np.int32)}, {"model": "none"})
    writer.close()
    trace = read_trace(tmp_path / "some.npz")
    assert (trace.num_tokens, trace.num_layers) == (0, LAYERS)


def test_whatever_is_cut_off_the_rest_is_read(tmp_path):
    writer = write_some(tmp_path / "some.npz", 5)
    data = writer.partial_path.read_bytes()
    whole = read_trace(writer.partial_path)
    ends, at = [], len(file_header())
    while at < len(data):
        at += 8 + struct.unpack_from("<I", data, at)[0]
        ends.append(at)
    cut = tmp_path / "cut.partial"
    for size in np.random.default_rng(0).integers(len(file_header()), len(data) + 1, size=200):
        cut.write_bytes(data[:size])
        num_tokens = 10 * sum(end <= size for end in ends)
        trace = read_trace(cut)
        assert trace.num_tokens == num_tokens
        if num_tokens:
            np.testing.assert_array_equal(trace.experts, whole.experts[:num_tokens])
    writer.discard()


def test_a_killed_process_leaves_what_it_had_written(tmp_path):
    path = tmp_path / "some.npz"
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    code += f"import test_trace_writer, os, signal\ntest_trace_writer.write_some({str(path)!r}, 4)\n"
    code += "os.kill(os.getpid(), signal.SIGKILL)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert child.returncode == -9, child.stderr
    assert child.stdout.split() == ["1", "2", "3", "4"]
    assert read_trace(tmp_path / "some.npz.partial").num_tokens == 40
    assert not path.exists()


def test_what_is_left_of_a_crash_is_not_overwritten(tmp_path):
    left = tmp_path / "some.npz.partial"
    left.write_bytes(b"precious")
    with pytest.raises(ConfigError, match=r"is there already: .* move it away"):
        TraceWriter(tmp_path / "some.npz")
    assert left.read_bytes() == b"precious"


def test_paths_that_cannot_be_written_are_refused(tmp_path):
    for path in (tmp_path / "none" / "some.npz", tmp_path):
        with pytest.raises(ConfigError, match="cannot be written"):
            TraceWriter(path)


def test_a_full_disk_ends_the_trace(tmp_path):
    writer = write_some(tmp_path / "some.npz", 2)
    writer._file.close()
    writer._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115 - the writer closes it
    assert writer.failure is None
    writer.write(block(20, 10))
    writer.write(block(30, 10))
    writer.close()
    assert writer.failure == f"{writer.partial_path} cannot be written: No space left on device"
    assert read_trace(writer.partial_path).num_tokens == 20
    assert not writer.path.exists()


def frame_of(text, body=b""):
    data = zlib.compress(struct.pack("<I", len(text)) + text + body)
    return struct.pack("<II", len(data), zlib.crc32(data)) + data


@pytest.mark.parametrize(
    "frame",
    [
        frame_of(b"{"),
        frame_of(b"[]"),
        frame_of(b'{"arrays": [1], "meta": null}'),
        frame_of(json.dumps({"arrays": [["experts", "|O", [1, 1, 1], 0]], "meta": None}).encode(), bytes(8)),
        frame_of(json.dumps({"arrays": [["experts", "<i2", [-1, 1, 1], 0]], "meta": None}).encode(), bytes(8)),
        frame_of(json.dumps({"arrays": [["experts", "<i2", [1 << 40, 9, 9], 0]], "meta": None}).encode(), bytes(8)),
        frame_of(json.dumps({"arrays": [["experts", "<i2", [3], 0]], "meta": None}).encode(), bytes(8)),
        frame_of(json.dumps({"arrays": [], "meta": 1}).encode()),
        frame_of(b"[" * 100_000),
        struct.pack("<II", 3, zlib.crc32(b"abc")) + b"abc",
    ],
)
def test_frames_that_lie_are_refused(tmp_path, frame):
    path = tmp_path / "bad.partial"
    path.write_bytes(file_header() + frame)
    with pytest.raises(ConfigError, match=r"bad\.partial"):
        read_trace(path)


def test_other_versions_are_refused(tmp_path):
    path = tmp_path / "bad.partial"
    path.write_bytes(struct.pack("<8sI", b"MOETRACE", 2) + encode_frame(block(0, 1)))
    with pytest.raises(ConfigError, match="frames are of version 2"):
        read_trace(path)


def test_numbers_survive_narrowing(tmp_path):
    rng = np.random.default_rng(3)
    for scale in (1, 100, 200, 1 << 14, (1 << 15) - 1):
        writer = TraceWriter(tmp_path / f"{scale}.npz")
        arrays = block(0, 4)
        arrays["experts"] = rng.integers(-1, scale, arrays["experts"].shape).astype(np.int16)
        arrays["step_begin_us"] = (1 << 40) + np.cumsum(rng.integers(0, 10**9, 4)).astype(np.int64)
        writer.write(arrays)
        writer.close()
        trace = read_trace(writer.path)
        for name, array in arrays.items():
            np.testing.assert_array_equal(getattr(trace, name), array)


def test_small_numbers_take_a_byte_each():
    experts = np.full((1000, 1, 8), 60, np.int16)
    experts[0] = -1
    assert len(pack_arrays({"experts": experts})) < 8 * 1000 + 100
