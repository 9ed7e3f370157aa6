"""Memory limits of the side-by-side benchmark: what is written where, and that the group goes again."""

import shutil
import subprocess
import sys

import pytest
from peer_runs import memory_limit
from peer_runs.memory_limit import NoLimitError, check_limits, drop_page_cache, memory_group

GIB = 1 << 30


@pytest.fixture
def ordinary_folders(monkeypatch):
    """Groups go with ``rmdir`` whatever files they show; ordinary folders do not."""
    monkeypatch.setattr(memory_limit, "_remove", shutil.rmtree)


def first_version(root):
    folder = root / "sys/fs/cgroup/memory"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("9223372036854771712")
    return folder


def second_version(root, controllers="cpu io memory"):
    folder = root / "sys/fs/cgroup"
    folder.mkdir(parents=True)
    (folder / "cgroup.controllers").write_text(controllers)
    (folder / "cgroup.subtree_control").write_text("cpu")
    return folder


def test_first_version(tmp_path, ordinary_folders):
    parent = first_version(tmp_path)
    with memory_group(4 * GIB, tmp_path) as group:
        assert group.folder.parent == parent
        assert (group.folder / "memory.limit_in_bytes").read_text() == str(4 * GIB)
        (group.folder / "memory.max_usage_in_bytes").write_text("123\n")
        (group.folder / "memory.failcnt").write_text("7\n")
        assert (group.peak_bytes, group.num_reclaims) == (123, 7)
    assert not group.folder.exists()


def test_second_version(tmp_path, ordinary_folders):
    parent = second_version(tmp_path)
    with memory_group(2 * GIB, tmp_path) as group:
        assert group.folder.parent == parent
        assert (group.folder / "memory.max").read_text() == str(2 * GIB)
        (group.folder / "memory.events").write_text("low 0\nhigh 0\nmax 5\noom 0\n")
        assert (group.peak_bytes, group.num_reclaims) == (None, 5)
    assert (parent / "cgroup.subtree_control").read_text() == "+memory"
    assert not group.folder.exists()


def test_nothing_is_swapped(tmp_path, monkeypatch, ordinary_folders):
    first_version(tmp_path)
    mkdir = memory_limit.Path.mkdir

    def mkdir_with_swap(path, *arguments, **options):
        mkdir(path, *arguments, **options)
        (path / "memory.swappiness").write_text("60")

    monkeypatch.setattr(memory_limit.Path, "mkdir", mkdir_with_swap)
    with memory_group(GIB, tmp_path) as group:
        assert (group.folder / "memory.swappiness").read_text() == "0"


def test_no_limit_is_written_without_one(tmp_path, ordinary_folders):
    first_version(tmp_path)
    with memory_group(None, tmp_path) as group:
        assert not (group.folder / "memory.limit_in_bytes").exists()


def test_the_group_goes_when_it_is_interrupted(tmp_path, ordinary_folders):
    parent = first_version(tmp_path)
    with pytest.raises(KeyboardInterrupt), memory_group(GIB, tmp_path):
        raise KeyboardInterrupt
    assert [item.name for item in parent.iterdir()] == ["memory.limit_in_bytes"]


def test_reasons_why_there_is_no_limit(tmp_path):
    with pytest.raises(NoLimitError, match="no memory controller"):
        check_limits(tmp_path)
    second_version(tmp_path, controllers="cpu io")
    with pytest.raises(NoLimitError, match="no memory controller"):
        check_limits(tmp_path)
    shutil.rmtree(tmp_path / "sys")
    first_version(tmp_path)
    with pytest.raises(NoLimitError, match="run as root"):
        check_limits(tmp_path, is_root=lambda: False)
    check_limits(tmp_path, is_root=lambda: True)


def test_page_cache_of_files_is_dropped_without_root(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError

    file = tmp_path / "weights"
    file.write_bytes(b"x" * 8192)
    dropped = []
    monkeypatch.setattr(memory_limit.Path, "write_text", refuse)
    monkeypatch.setattr(memory_limit.os, "sync", lambda: None)
    monkeypatch.setattr(memory_limit.os, "posix_fadvise", lambda *call: dropped.append(call[3]))
    drop_page_cache([file])
    assert dropped == [memory_limit.os.POSIX_FADV_DONTNEED]


def test_a_real_group_stops_what_is_too_large():
    try:
        check_limits()
        with memory_group(64 << 20) as group:
            command = [sys.executable, "-c", "x = bytearray(256 << 20)"]
            done = subprocess.run(command, preexec_fn=group.enter, capture_output=True, check=False)
            assert done.returncode == -9
            assert group.num_reclaims > 0
    except (NoLimitError, PermissionError) as reason:
        pytest.skip(str(reason))
    assert not group.folder.exists()
