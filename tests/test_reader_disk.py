import errno
import fcntl
import mmap
import os
import threading

import pytest

from moe_offload.offload.streaming.disk import DirectDisk
from moe_offload.offload.streaming.open_files import OpenFiles

DATA = bytes(range(256)) * 64  # 16 KiB


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def buffer():
    return memoryview(mmap.mmap(-1, 16384))


def refuse_direct(monkeypatch, call, number):
    """Make ``os.open`` or ``os.preadv`` do as a file system without O_DIRECT."""
    original = getattr(os, call)

    def refusing(target, argument, *rest):
        flags = argument if call == "open" else fcntl.fcntl(target, fcntl.F_GETFL)
        if flags & os.O_DIRECT:
            raise OSError(number, os.strerror(number))
        return original(target, argument, *rest)

    monkeypatch.setattr(os, call, refusing)


@pytest.mark.parametrize(
    ("offset_bytes", "size_bytes"), [(0, 16384), (4096, 4096), (1, 4096), (4096, 5), (4096, 16384)]
)
def test_reads(path, buffer, offset_bytes, size_bytes):
    file = DirectDisk().open(path)
    expected = DATA[offset_bytes : offset_bytes + size_bytes]
    assert file.pread_into(buffer[:size_bytes], offset_bytes) == len(expected)
    assert buffer[: len(expected)] == expected
    assert file.pread_into(buffer[:4096], 16384) == 0
    file.close()


def test_direct_reads_leave_the_page_cache_alone(path, buffer):
    disk = DirectDisk()
    file = disk.open(path)
    file.pread_into(buffer, 0)
    file.close()
    assert disk.buffered_files == 0


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("call", ["open", "preadv"])
def test_a_file_system_without_direct_reads(path, buffer, monkeypatch, call, number):
    refuse_direct(monkeypatch, call, number)
    advised = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *arguments: advised.append(arguments))
    disk = DirectDisk()
    file = disk.open(path)
    for _ in range(2):
        buffer[:] = bytes(16384)
        assert file.pread_into(buffer, 0) == 16384
        assert buffer == DATA
    file.close()
    assert disk.buffered_files == 1
    assert advised == [(0, 16384, os.POSIX_FADV_DONTNEED)] * 2


def test_direct_reads_switched_off(path, buffer):
    disk = DirectDisk(direct=False)
    file = disk.open(path)
    assert file.pread_into(buffer, 0) == 16384
    file.close()
    assert disk.buffered_files == 1


def test_other_errors_are_not_taken_for_refusals(path, buffer, monkeypatch):
    file = DirectDisk().open(path)
    refuse_direct(monkeypatch, "preadv", errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        file.pread_into(buffer, 0)
    file.close()
    with pytest.raises(FileNotFoundError):
        DirectDisk().open(path.with_name("missing"))


class CountingDisk:
    def __init__(self):
        self.opened = []
        self.closed = []

    def open(self, path):
        disk = self

        class File:
            def close(self):
                disk.closed.append(path.name)

        self.opened.append(path.name)
        return File()


def test_files_are_opened_once_and_the_oldest_closed(tmp_path):
    disk = CountingDisk()
    files = OpenFiles(disk, tmp_path, max_open=2)
    for name in ("a", "b", "a", "c", "a", "b"):
        with files.borrow(name):
            pass
    assert disk.opened == ["a", "b", "c", "b"]
    assert disk.closed == ["b", "c"]
    files.close()
    assert sorted(disk.closed) == ["a", "b", "b", "c"]


def test_a_file_in_use_is_not_closed(tmp_path):
    disk = CountingDisk()
    files = OpenFiles(disk, tmp_path, max_open=1)
    with files.borrow("a"):
        with files.borrow("b"):
            assert disk.closed == []
        files.close()
        assert disk.closed == ["b"]
    assert disk.closed == ["b", "a"]


def test_two_threads_that_open_one_file(tmp_path):
    disk = CountingDisk()
    both = threading.Barrier(2)
    open_file = disk.open

    def slow_open(path):
        both.wait(30)
        return open_file(path)

    disk.open = slow_open
    files = OpenFiles(disk, tmp_path)
    used = []

    def use():
        with files.borrow("a") as file:
            used.append(file)
            both.wait(30)

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert used[0] is used[1]
    assert disk.closed == ["a"]
