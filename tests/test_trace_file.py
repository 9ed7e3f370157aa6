"""Traces as files: what is written is read again, and what is no trace is refused."""

import zipfile

import numpy as np
import pytest

from moe_offload.cache import RoutingTrace, read_trace, write_trace
from moe_offload.cache.trace import LAYOUT
from moe_offload.errors import ConfigError

AXES = {"tokens": 5, "layers": 3, "top_k": 2, "distances": 2, "predicted experts": 4, "steps": 4, "four times": 4}
AXES |= {"transfers": 6, "copies": 8, "links": 2, "events": 7, "experts of events": 7}
NUM_EXPERTS = 9


def whole_trace(seed=0):
    """Every array, with values that may be."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, (dtype, axes) in LAYOUT.items():
        shape = [AXES[axis] for axis in axes]
        arrays[name] = rng.random(shape).astype(dtype) if dtype.startswith("float") else rng.integers(2, size=shape)
    arrays["num_experts"] = np.full(AXES["layers"], NUM_EXPERTS)
    arrays["experts"] = rng.integers(-1, NUM_EXPERTS, size=arrays["experts"].shape)
    arrays["event_size"] = np.ones(AXES["events"], dtype=int)
    return RoutingTrace(**arrays, meta={"model": "a model", "policy": "lru"})


def assert_same(found, expected):
    assert found.arrays().keys() == expected.arrays().keys()
    for name, array in expected.arrays().items():
        np.testing.assert_array_equal(getattr(found, name), array, err_msg=name)
        assert getattr(found, name).dtype == LAYOUT[name][0]


def test_all_that_is_written_is_read_again(tmp_path):
    trace = whole_trace()
    write_trace(tmp_path / "some.npz", trace)
    found = read_trace(tmp_path / "some.npz")
    assert_same(found, trace)
    assert found.meta == {"trace_version": 1, "model": "a model", "policy": "lru"}
    assert [path.name for path in tmp_path.iterdir()] == ["some.npz"]


def test_the_published_arrays_are_enough(tmp_path):
    experts = np.zeros((4, 2, 3), dtype=np.int16)
    np.savez(tmp_path / "some.npz", experts=experts, sequence=np.zeros(4, np.int32), phase=np.ones(4, np.uint8))
    trace = read_trace(tmp_path / "some.npz")
    assert (trace.num_tokens, trace.num_layers, trace.top_k) == (4, 2, 3)
    assert trace.probs is None
    assert trace.meta == {}


def test_what_is_not_known_is_left_out(tmp_path):
    np.savez(tmp_path / "some.npz", experts=np.zeros((1, 1, 1), int), other=np.array([{}], dtype=object))
    assert list(read_trace(tmp_path / "some.npz").arrays()) == ["experts"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": np.zeros((5, 3), int)}, r"'experts' of a trace has shape \(5, 3\), not \[tokens, layers, top_k\]"),
        ({"experts": np.zeros((5, 3, 2))}, "'experts' of a trace is float64, not int16"),
        ({"experts": np.full((5, 3, 2), 1 << 20)}, "'experts' of a trace has values outside int16"),
        ({"experts": np.full((5, 3, 2), NUM_EXPERTS)}, "experts of a trace must be experts of their layer, or -1"),
        ({"predicted": np.full((5, 3, 2, 4), -2)}, "predicted of a trace must be experts of their layer, or -1"),
        ({"sequence": np.zeros(4, int)}, "'sequence' of a trace is .* with 5 tokens as 'experts'"),
        ({"phase": np.full(5, 2)}, r"phase of a trace must lie in 0\.\.1"),
        ({"step": np.full(5, 4)}, r"step of a trace must lie in 0\.\.3"),
        ({"transfer_layer": np.full(6, 3)}, r"transfer_layer of a trace must lie in 0\.\.2"),
        ({"event_size": np.full(7, 2)}, "the events of a trace name 14 experts, event_experts has 7"),
        ({"event_kind": np.full(7, 99)}, "event_kind of a trace must lie in"),
        ({"distance": None}, "needs them all, and has no distance"),
        ({"transfer_kind": None}, "needs them all, and has no transfer_kind"),
        ({"step": None, "step_begin_us": None, "step_us": None, "step_tokens": None}, "with layer_us needs step_us"),
    ],
)
def test_arrays_that_contradict_each_other_are_refused(tmp_path, changes, message):
    arrays = {name: array for name, array in (whole_trace().arrays() | changes).items() if array is not None}
    with pytest.raises(ConfigError, match=message):
        RoutingTrace(**arrays)
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ConfigError, match=message):
        read_trace(tmp_path / "bad.npz")


def test_pickles_are_never_read(tmp_path):
    np.savez(tmp_path / "bad.npz", experts=np.array([{}], dtype=object))
    with pytest.raises(ConfigError, match=r"is not an \.npz file"):
        read_trace(tmp_path / "bad.npz")


@pytest.mark.parametrize("meta", ["[1]", "{", "[" * 100_000])
def test_meta_that_is_no_object_is_refused(tmp_path, meta):
    np.savez(tmp_path / "bad.npz", experts=np.zeros((1, 1, 1), int), meta=np.array(meta))
    with pytest.raises(ConfigError, match=r"is not an \.npz file"):
        read_trace(tmp_path / "bad.npz")


@pytest.mark.parametrize("version", [2, "1", None, True])
def test_later_versions_are_refused(tmp_path, version):
    write_trace(tmp_path / "some.npz", RoutingTrace(np.zeros((1, 1, 1), int), meta={"trace_version": version}))
    with pytest.raises(ConfigError, match="is a trace of version"):
        read_trace(tmp_path / "some.npz")


def test_damaged_files_are_refused(tmp_path):
    """Whatever byte is changed, the file is read as it was or refused."""
    trace, path = whole_trace(), tmp_path / "some.npz"
    write_trace(path, trace)
    data, rng = path.read_bytes(), np.random.default_rng(1)
    for position in rng.integers(len(data), size=150):
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            read_trace(path)
        except ConfigError as error:
            assert str(path) in str(error)  # noqa: PT017 - not raising is fine too
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigError, match=r"is not an \.npz file"):
        read_trace(path)


def test_a_header_that_claims_too_much_is_refused(tmp_path):
    path = tmp_path / "huge.npz"
    with zipfile.ZipFile(path, "w") as stored, stored.open("experts.npy", "w") as file:
        header = {"descr": "<i2", "fortran_order": False, "shape": (1 << 40, 1 << 20, 8)}
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(ConfigError, match=r"is not an \.npz file|does not fit into memory"):
        read_trace(path)


def test_a_path_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be written"):
        write_trace(tmp_path / "none" / "some.npz", whole_trace())
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        write_trace(tmp_path / "folder", whole_trace())
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
