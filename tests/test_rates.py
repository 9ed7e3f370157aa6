import errno
import os

import pytest
import torch

from moe_offload.offload.planning.rates import Rate, disk_read_rate, host_to_device_rate, memory_read_rate

MIB = 1024**2


def test_memory_is_read_whole():
    rate = memory_read_rate(8 * MIB)
    assert rate.num_bytes == 8 * MIB
    assert rate.bytes_per_s > 0


def test_a_folder_is_left_as_it_was(tmp_path):
    rate = disk_read_rate(tmp_path, read_bytes=MIB, file_bytes=8 * MIB)
    assert rate.num_bytes == 8 * MIB
    assert rate.read_bytes == MIB
    assert list(tmp_path.iterdir()) == []


def test_the_new_file_is_removed_when_the_disk_is_full(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        disk_read_rate(tmp_path, file_bytes=MIB)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_any_length_is_read_to_its_end_and_kept(tmp_path):
    path = tmp_path / "pack"
    path.write_bytes(b"x" * (3 * MIB + 17))
    assert disk_read_rate(path, read_bytes=MIB + 5).num_bytes == 3 * MIB + 17
    assert path.stat().st_size == 3 * MIB + 17


def test_where_direct_reads_are_refused_buffered_ones_do(tmp_path, monkeypatch):
    path = tmp_path / "pack"
    path.write_bytes(b"x" * MIB)
    opened = os.open

    def refuse_direct(name, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opened(name, flags, *rest)

    monkeypatch.setattr(os, "open", refuse_direct)
    rate = disk_read_rate(path, read_bytes=MIB)
    assert rate.num_bytes == MIB
    assert not rate.direct


def test_nothing_moved_is_no_rate():
    assert Rate(0, 0.0).bytes_per_s == 0.0
    assert Rate(3_000_000_000, 2.0).gb_per_s == 1.5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_there_is_no_link():
    assert host_to_device_rate() is None
