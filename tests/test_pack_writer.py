import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time
import tracemalloc

import pytest
import tiny_packs
from safetensors import safe_open
from tiny_packs import IDENTITY

from moe_offload.errors import ConfigError, DiskFullError, PackCorruptError, PackIncompleteError
from moe_offload.offload.pack import partial_file
from moe_offload.offload.pack.manifest import LayerLayout, is_pack, read_manifest
from moe_offload.offload.pack.safetensors_file import HEADER_ROOM_BYTES, check_dense_file, dense_checksum
from moe_offload.offload.pack.writer import PackWriter
from moe_offload.offload.planning.sizes import format_size


def names(folder):
    return sorted(os.listdir(folder))


def contents(folder):
    return {name: (folder / name).read_bytes() for name in names(folder)}


@pytest.fixture
def pack(tmp_path):
    return tmp_path / "pack"


def open_writer(folder, **changes):
    return PackWriter(folder, identity=IDENTITY | changes)


def test_expert_files_are_safetensors(pack):
    manifest = tiny_packs.write_pack(pack)
    for layer_idx, layer in enumerate(manifest.layers):
        with safe_open(pack / layer.file, framework="numpy") as file:
            keys = set(file.keys())
            assert keys == {f"layers.{layer_idx}.experts.{expert_idx}" for expert_idx in range(4)}
            for expert_idx in range(4):
                tensor = file.get_tensor(f"layers.{layer_idx}.experts.{expert_idx}")
                assert tensor.dtype == "uint8"
                assert tensor.tobytes() == tiny_packs.expert_bytes(layer_idx, expert_idx)


def test_experts_lie_where_the_manifest_says(pack):
    manifest = tiny_packs.write_pack(pack)
    for layer_idx, layer in enumerate(manifest.layers):
        for expert_idx, expert in layer.experts.items():
            assert expert.offset_bytes % 4096 == 0
            data = (pack / expert.file).read_bytes()[expert.offset_bytes :][: layer.slot_bytes]
            assert data == tiny_packs.expert_bytes(layer_idx, expert_idx)


def test_a_finished_pack_holds_nothing_else(pack):
    tiny_packs.write_pack(pack)
    assert names(pack) == [
        "dense-00000.safetensors",
        "dense.safetensors.index.json",
        "experts-00000.safetensors",
        "experts-00001.safetensors",
        "pack.json",
    ]


def test_layers_in_any_order(pack):
    with open_writer(pack) as writer:
        for layer_idx in (2, 0, 1):
            tiny_packs.write_layer(writer, layer_idx)
        manifest = tiny_packs.finish(writer)
    assert [layer.file for layer in manifest.layers] == [f"experts-{i:05d}.safetensors" for i in range(3)]


def test_dense_files_and_their_index(pack):
    with open_writer(pack) as writer:
        tiny_packs.write_layer(writer, 0)
        writer.dense_file(
            "dense-00001.safetensors",
            [("b", "BF16", (2, 3), bytes(range(12))), ("empty", "F32", (0, 5), b""), ("scalar", "F32", (), bytes(4))],
        )
        writer.dense_file("dense-00000.safetensors", [("a", "U8", (5,), memoryview(b"hello"))])
        manifest = tiny_packs.finish(writer)
    index = json.loads((pack / "dense.safetensors.index.json").read_text())
    assert index == {
        "metadata": {},
        "weight_map": {
            "a": "dense-00000.safetensors",
            "b": "dense-00001.safetensors",
            "empty": "dense-00001.safetensors",
            "scalar": "dense-00001.safetensors",
        },
    }
    with safe_open(pack / "dense-00001.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("b").shape == (2, 3)
        assert file.get_tensor("empty").shape == (0, 5)
        assert file.get_tensor("scalar").shape == ()
    with safe_open(pack / "dense-00000.safetensors", framework="pt") as file:
        assert bytes(file.get_tensor("a").tolist()) == b"hello"
    for dense in manifest.dense:
        assert dense.size_bytes == (pack / dense.file).stat().st_size
        check_dense_file(pack, dense)


def test_a_dense_header_that_outgrows_its_room(pack):
    tensors = [(f"{'x' * 100}.{i}", "U8", (3,), bytes([i % 256] * 3)) for i in range(1000)]
    with open_writer(pack) as writer:
        tiny_packs.write_layer(writer, 0)
        dense = writer.dense_file("dense-00000.safetensors", iter(tensors))
        manifest = tiny_packs.finish(writer)
    path = pack / dense.file
    assert path.stat().st_size == dense.size_bytes > HEADER_ROOM_BYTES + 3000
    check_dense_file(pack, manifest.dense[0])
    with safe_open(path, framework="numpy") as file:
        assert {key: file.get_tensor(key).tobytes() for key in file.keys()} == {t[0]: t[3] for t in tensors}  # noqa: SIM118
    assert not [name for name in names(pack) if "partial" in name]


@pytest.mark.parametrize("place", [4, 100, HEADER_ROOM_BYTES + 1])
def test_a_damaged_dense_file_is_found(pack, place):
    manifest = tiny_packs.write_pack(pack)
    path = pack / manifest.dense[0].file
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(PackCorruptError, match=r"dense-00000\.safetensors"):
        check_dense_file(pack, manifest.dense[0])


def test_tensors_are_taken_one_at_a_time(pack):
    given = []

    def tensors():
        for i in range(3):
            given.append(i)
            yield f"t{i}", "U8", (1 << 20,), bytes(1 << 20)
            (file,) = pack.glob("*.partial")
            assert file.stat().st_size >= (i + 1) << 20

    with open_writer(pack) as writer:
        writer.dense_file("dense-00000.safetensors", tensors())
    assert given == [0, 1, 2]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [(("a", "F32", (2,), bytes(7)), "a: 7 bytes for F32"), (("b", "U8", (1,), b"x"), "two tensors are named 'b'")],
)
def test_wrong_tensors_leave_no_file(pack, tensor, message):
    with open_writer(pack) as writer:
        with pytest.raises(ValueError, match=message):
            writer.dense_file("dense-00000.safetensors", [("b", "U8", (1,), b"x"), tensor])
        assert writer.done_dense() == set()
    assert names(pack) == ["pack.journal"]


def test_experts_out_of_order_or_size(pack):
    with open_writer(pack) as writer:
        with pytest.raises(ValueError, match="expected expert 0"), writer.layer(0, tiny_packs.layout(0)) as layer:
            layer.write_expert(1, bytes(8192))
        with pytest.raises(ValueError, match="got expert 0 in 8191"), writer.layer(0, tiny_packs.layout(0)) as layer:
            layer.write_expert(0, bytes(8191))
        with pytest.raises(PackCorruptError, match="1 checksums for 4"), writer.layer(0, tiny_packs.layout(0)) as layer:
            layer.write_expert(0, bytes(8192))
        assert writer.done_layers() == set()
    assert names(pack) == ["pack.journal"]


def test_a_gap_in_the_layers(pack):
    with open_writer(pack) as writer:
        tiny_packs.write_layer(writer, 1)
        with pytest.raises(ValueError, match=r"only \[1\]"):
            tiny_packs.finish(writer)
    assert not is_pack(pack)


def test_copied_files(pack, tmp_path):
    source = tmp_path / "config.json"
    source.write_text('{"a": 1}')
    with open_writer(pack) as writer:
        writer.copy_file(source)
        writer.copy_file(source, "generation_config.json")
        source.write_text('{"a": 2}')
        writer.copy_file(source)
        for name in ("pack.json", "../x", "experts-00000.safetensors", "pack.journal"):
            with pytest.raises(ValueError, match="not a name"):
                writer.copy_file(source, name)
    assert (pack / "config.json").read_text() == '{"a": 2}'
    assert (pack / "generation_config.json").read_text() == '{"a": 1}'


def test_resume_takes_over_what_is_whole(pack):
    with open_writer(pack) as writer:
        tiny_packs.write_layer(writer, 0)
        writer.dense_file("dense-00000.safetensors", [("norm", "F32", (4,), bytes(16))])
    inode = (pack / "experts-00000.safetensors").stat().st_ino
    (pack / "experts-00001.safetensors.partial").write_bytes(b"half")
    (pack / "experts-00001.safetensors").write_bytes(b"renamed, but the journal line was lost")
    with pytest.raises(PackIncompleteError):
        read_manifest(pack)
    with open_writer(pack) as writer:
        assert writer.done_layers() == {0}
        assert writer.done_dense() == {"dense-00000.safetensors"}
        assert names(pack) == ["dense-00000.safetensors", "experts-00000.safetensors", "pack.journal"]
        tiny_packs.write_layer(writer, 1)
        tiny_packs.finish(writer)
    assert (pack / "experts-00000.safetensors").stat().st_ino == inode
    uninterrupted = pack.parent / "other"
    tiny_packs.write_pack(uninterrupted)
    assert contents(pack) == contents(uninterrupted)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: os.truncate(path, 5000)])
def test_resume_writes_again_what_was_lost(pack, damage):
    with open_writer(pack) as writer:
        tiny_packs.write_layer(writer, 0)
        tiny_packs.write_layer(writer, 1)
    damage(pack / "experts-00000.safetensors")
    with open_writer(pack) as writer:
        assert writer.done_layers() == {1}
        tiny_packs.write_layer(writer, 0)
        tiny_packs.finish(writer)
    assert len(read_manifest(pack).layers) == 2


@pytest.mark.parametrize("cut", [1, 10, 150])
def test_a_journal_line_cut_short_is_dropped(pack, cut):
    with open_writer(pack) as writer:
        tiny_packs.write_layer(writer, 0)
        tiny_packs.write_layer(writer, 1)
    journal = pack / "pack.journal"
    os.truncate(journal, journal.stat().st_size - cut)
    for _ in range(2):
        with open_writer(pack) as writer:
            assert writer.done_layers() == {0}
    with open_writer(pack) as writer:
        tiny_packs.write_layer(writer, 1)
        tiny_packs.finish(writer)
    assert len(read_manifest(pack).layers) == 2


def test_another_identity_starts_clean(pack, tmp_path):
    config = tmp_path / "config.json"
    config.write_text("{}")
    with open_writer(pack) as writer:
        writer.copy_file(config)
        tiny_packs.write_layer(writer, 0)
    (pack / "notes.txt").write_text("the user's own, put here later")
    with open_writer(pack, revision="r2") as writer:
        assert writer.done_layers() == set()
        assert names(pack) == ["notes.txt", "pack.journal"]
    with open_writer(pack) as writer:
        assert writer.done_layers() == set()


def test_a_strangers_file_is_not_replaced(pack, tmp_path):
    with open_writer(pack):
        pass
    (pack / "config.json").write_text("the user's own")
    (tmp_path / "config.json").write_text("{}")
    with open_writer(pack) as writer, pytest.raises(ConfigError, match="in the way"):
        writer.copy_file(tmp_path / "config.json")
    assert (pack / "config.json").read_text() == "the user's own"


@pytest.mark.parametrize("name", ["notes.txt", "experts-00000.safetensors", ".hidden"])
def test_a_folder_of_unrelated_files_is_refused(pack, name):
    pack.mkdir()
    (pack / name).write_text("precious")
    with pytest.raises(ConfigError, match=f"holds files that are no pack .*{name}"):
        open_writer(pack)
    assert contents(pack) == {name: b"precious"}


def test_a_finished_pack_is_left_alone(pack):
    tiny_packs.write_pack(pack)
    before = contents(pack)
    with pytest.raises(ConfigError, match="already holds a finished pack"):
        open_writer(pack, revision="r2")
    assert contents(pack) == before


def test_a_file_in_place_of_the_folder(pack):
    pack.write_text("x")
    with pytest.raises(ConfigError, match="cannot pack into"):
        open_writer(pack)


def test_two_writers_of_one_folder(pack):
    with open_writer(pack) as writer:
        tiny_packs.write_layer(writer, 0)
        for _ in range(2):
            with pytest.raises(ConfigError, match="another process is packing into"):
                open_writer(pack)
        assert (pack / "experts-00000.safetensors").exists()
    with open_writer(pack) as writer:
        assert writer.done_layers() == {0}


@pytest.mark.parametrize("name", ["../victim", "/tmp/victim", "a/../../victim"])
def test_a_journal_cannot_name_files_elsewhere(pack, tmp_path, name):
    (tmp_path / "victim").write_text("x")
    with open_writer(pack):
        pass
    with (pack / "pack.journal").open("a") as journal:
        journal.write(json.dumps({"copied": name}) + "\n")
    with pytest.raises(ConfigError, match="journal is damaged"):
        open_writer(pack, revision="r2")
    assert (tmp_path / "victim").exists()


class FailingWrite:
    """Stands in for os.write: lets some bytes through, then fails as a full disk does."""

    def __init__(self, room_bytes, number=errno.ENOSPC):
        self.room_bytes = room_bytes
        self.number = number
        self.write = os.write

    def __call__(self, fd, data):
        if self.room_bytes <= 0:
            raise OSError(self.number, os.strerror(self.number))
        count = self.write(fd, data[: self.room_bytes])
        self.room_bytes -= count
        return count


def one_layer_bytes(folder):
    tiny_packs.write_pack(folder, num_layers=1)
    size_bytes = (folder / "experts-00000.safetensors").stat().st_size
    shutil.rmtree(folder)
    return size_bytes


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("room_bytes", [0, 1, 4096, 8192, 20_000, 36_863, 36_864, 36_900])
def test_disk_full_keeps_what_is_finished(pack, monkeypatch, room_bytes, number):
    assert one_layer_bytes(pack) == 36_864  # the last room holds the layer, but not its journal line
    with open_writer(pack) as writer:
        tiny_packs.write_layer(writer, 0)
        journal = (pack / "pack.journal").read_bytes()
        monkeypatch.setattr(partial_file.os, "write", FailingWrite(room_bytes, number))
        with pytest.raises(DiskFullError, match=r"(the disk is full|quota).* needs .* free; make room") as caught:
            tiny_packs.write_layer(writer, 1)
        monkeypatch.undo()
        assert "pack.journal" in str(caught.value) or f"experts-00001.safetensors needs {format_size(36_864)}" in str(
            caught.value
        )
        assert not list(pack.glob("*.partial"))
        assert (pack / "pack.journal").read_bytes() == journal
        assert writer.done_layers() == {0}
    with open_writer(pack) as writer:
        assert writer.done_layers() == {0}
        tiny_packs.write_layer(writer, 1)
        tiny_packs.finish(writer)
    assert len(read_manifest(pack).layers) == 2


def test_disk_full_everywhere_never_leaves_a_pack(pack, monkeypatch):
    """Each run gets a little more room until one finishes."""
    for room_bytes in range(0, 200_000, 3989):
        monkeypatch.setattr(partial_file.os, "write", FailingWrite(room_bytes))
        try:
            tiny_packs.write_pack(pack, num_experts=1)
        except DiskFullError:
            assert not is_pack(pack)
            assert not list(pack.glob("*.partial"))
            shutil.rmtree(pack)
        else:
            break
        finally:
            monkeypatch.undo()
    assert len(read_manifest(pack).layers) == 2


def test_another_failure_to_write(pack, monkeypatch):
    with open_writer(pack) as writer:
        monkeypatch.setattr(partial_file.os, "write", FailingWrite(5000, errno.EIO))
        with pytest.raises(ConfigError, match=r"cannot write .*experts-00000\.safetensors: Input/output error"):
            tiny_packs.write_layer(writer, 0)
        monkeypatch.undo()
    assert names(pack) == ["pack.journal"]


def test_writes_that_take_a_few_bytes_at_a_time(pack, monkeypatch):
    write = os.write
    monkeypatch.setattr(partial_file.os, "write", lambda fd, data: write(fd, data[:777]))
    tiny_packs.write_pack(pack)
    monkeypatch.undo()
    tiny_packs.write_pack(pack.parent / "other")
    assert contents(pack) == contents(pack.parent / "other")


def test_interrupted_by_the_user(pack):
    def run():
        with open_writer(pack) as writer:
            tiny_packs.write_layer(writer, 0)
            with writer.layer(1, tiny_packs.layout(1)) as layer:
                layer.write_expert(0, bytes(8192))
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert names(pack) == ["experts-00000.safetensors", "pack.journal"]
    with open_writer(pack) as writer:
        assert writer.done_layers() == {0}


def test_what_is_journalled_is_synced_first(pack, monkeypatch):
    """Order of syncs and renames: data, name, folder, and only then the line that vouches for them."""
    events = []
    fsync, replace = os.fsync, os.replace

    def name_of(fd):
        return os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))

    with open_writer(pack) as writer:
        monkeypatch.setattr(os, "fsync", lambda fd: (events.append(name_of(fd)), fsync(fd)))
        monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
        tiny_packs.write_layer(writer, 0)
        monkeypatch.undo()
    assert events == ["experts-00000.safetensors.partial", "rename", "pack", "pack.journal"]


def start_child(folder):
    """A child that packs 6 layers and a dense file into ``folder``; returns once it has begun."""
    program = "import sys; sys.path.insert(0, sys.argv[1]); import tiny_packs; tiny_packs.resume_pack(sys.argv[2])"
    command = [sys.executable, "-c", program, os.path.dirname(__file__), str(folder)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"begun\n"
    return child


def test_kill_at_any_moment(pack, tmp_path):
    """Children are killed at random times; what one leaves, the next goes on with."""
    whole = tmp_path / "whole"
    with start_child(whole) as child:
        start_s = time.monotonic()
        child.wait()
        usual_s = time.monotonic() - start_s
    expected = contents(whole)
    random_times = random.Random(0)
    unfinished = 0
    for _ in range(12):
        with start_child(pack) as child:
            time.sleep(random_times.uniform(0, 0.7 * usual_s))
            child.kill()
        if is_pack(pack):
            read_manifest(pack)
            assert {name: data for name, data in contents(pack).items() if name != "pack.journal"} == expected
            shutil.rmtree(pack)
        elif pack.exists() and os.listdir(pack):
            with pytest.raises(PackIncompleteError):
                read_manifest(pack)
            with open_writer(pack) as writer:
                unfinished += 0 < len(writer.done_layers()) < 6
            assert not list(pack.glob("*.partial"))
    assert unfinished, "no child was killed in the middle"
    if not is_pack(pack):
        with start_child(pack):
            pass
    assert contents(pack) == expected


def test_memory_stays_small(pack):
    """What the writer holds does not grow with what it writes."""
    data = memoryview(bytes(1 << 20))
    layout = LayerLayout.of("layer", 24, [("weight", (1 << 20,), "int8", 1 << 20)])
    with open_writer(pack) as writer:
        tracemalloc.start()
        with writer.layer(0, layout) as layer:
            for expert_idx in range(24):
                layer.write_expert(expert_idx, data)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak_bytes < 1 << 20


def test_what_is_no_safetensors_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"\xff" * 20)
    with pytest.raises(PackCorruptError, match="not a safetensors file"):
        dense_checksum(path)
