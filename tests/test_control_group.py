"""Limits of the benchmarks' processes: what is written where, who enters, and that the groups go again."""

import shutil
import subprocess
import sys
from pathlib import Path

import control_group as groups
import pytest
from control_group import ControlGroup, MemoryLimit, NoLimitError, ReadLimit, check_limits, control_group
from disk_rate import disk_of

GIB = 1 << 30
SLOW = ReadLimit("254:0", 800_000_000)


@pytest.fixture
def ordinary_folders(monkeypatch):
    """Groups go with ``rmdir`` whatever files they show; ordinary folders do not."""
    monkeypatch.setattr(groups, "_remove", shutil.rmtree)


def first_version(root):
    mount = root / "sys/fs/cgroup"
    for name, file in (("memory", "memory.limit_in_bytes"), ("blkio", "blkio.throttle.read_bps_device")):
        (mount / name).mkdir(parents=True)
        (mount / name / file).write_text("")
    return mount


def second_version(root, controllers="cpu io memory"):
    mount = root / "sys/fs/cgroup"
    mount.mkdir(parents=True)
    (mount / "cgroup.controllers").write_text(controllers)
    (mount / "cgroup.subtree_control").write_text("cpu")
    return mount


def test_first_version(tmp_path, ordinary_folders):
    mount = first_version(tmp_path)
    with control_group([MemoryLimit(4 * GIB), SLOW], tmp_path) as group:
        memory, disk = group.folders[MemoryLimit], group.folders[ReadLimit]
        assert (memory.parent, disk.parent) == (mount / "memory", mount / "blkio")
        assert (memory / "memory.limit_in_bytes").read_text() == str(4 * GIB)
        assert (disk / "blkio.throttle.read_bps_device").read_text() == "254:0 800000000"
        (memory / "memory.max_usage_in_bytes").write_text("123\n")
        (memory / "memory.failcnt").write_text("7\n")
        assert (group.peak_bytes, group.num_reclaims) == (123, 7)
        done = subprocess.run([*group.launcher, "sh", "-c", "echo $$; exit 3"], capture_output=True, check=False)
        assert done.returncode == 3
        assert (memory / "cgroup.procs").read_bytes() == (disk / "cgroup.procs").read_bytes() == done.stdout
    assert not memory.exists()
    assert not disk.exists()


def test_second_version(tmp_path, ordinary_folders, monkeypatch):
    mount = second_version(tmp_path)
    enabled = []
    write = groups._write
    monkeypatch.setattr(groups, "_write", lambda path, text: (enabled.append((path.name, text)), write(path, text)))
    with control_group([MemoryLimit(2 * GIB), SLOW], tmp_path) as group:
        (folder,) = set(group.folders.values())
        assert folder.parent == mount
        assert (folder / "memory.max").read_text() == str(2 * GIB)
        assert (folder / "io.max").read_text() == "254:0 rbps=800000000"
        (folder / "memory.events").write_text("low 0\nhigh 0\nmax 5\noom 0\n")
        assert (group.peak_bytes, group.num_reclaims) == (None, 5)
    assert [text for name, text in enabled if name == "cgroup.subtree_control"] == ["+memory", "+io"]
    assert not folder.exists()


def test_nothing_is_swapped(tmp_path, monkeypatch, ordinary_folders):
    first_version(tmp_path)
    mkdir = Path.mkdir

    def mkdir_with_swap(path, *arguments, **options):
        mkdir(path, *arguments, **options)
        (path / "memory.swappiness").write_text("60")

    monkeypatch.setattr(Path, "mkdir", mkdir_with_swap)
    with control_group([MemoryLimit(GIB)], tmp_path) as group:
        assert (group.folders[MemoryLimit] / "memory.swappiness").read_text() == "0"


def test_memory_is_counted_without_a_limit(tmp_path, ordinary_folders):
    first_version(tmp_path)
    with control_group([MemoryLimit(None)], tmp_path) as group:
        (folder,) = group.folders.values()
        assert not (folder / "memory.limit_in_bytes").exists()
        (folder / "memory.max_usage_in_bytes").write_text("9\n")
        assert group.peak_bytes == 9


@pytest.mark.parametrize("make", [first_version, second_version])
def test_a_disk_alone_counts_no_memory(tmp_path, ordinary_folders, make):
    make(tmp_path)
    with control_group([SLOW], tmp_path) as group:
        assert list(group.folders) == [ReadLimit]
        assert (group.peak_bytes, group.num_reclaims) == (None, None)


def test_without_limits_there_is_no_group(tmp_path):
    with control_group([], tmp_path) as group:
        assert group == ControlGroup({})
        assert group.launcher == []
        assert group.peak_bytes is None


def test_the_groups_go_when_they_are_interrupted(tmp_path, ordinary_folders):
    mount = first_version(tmp_path)
    with pytest.raises(KeyboardInterrupt), control_group([MemoryLimit(GIB), SLOW], tmp_path):
        raise KeyboardInterrupt
    assert [item.name for item in (mount / "memory").iterdir()] == ["memory.limit_in_bytes"]
    assert [item.name for item in (mount / "blkio").iterdir()] == ["blkio.throttle.read_bps_device"]


def test_a_limit_that_the_kernel_refuses_leaves_no_group(tmp_path, monkeypatch, ordinary_folders):
    mount = first_version(tmp_path)

    def refuse(path, text):
        raise OSError(19, "No such device")

    monkeypatch.setattr(Path, "write_text", refuse)
    with (
        pytest.raises(NoLimitError, match=r"read_bps_device does not take '254:0 800000000': No such device"),
        control_group([SLOW], tmp_path),
    ):
        pass
    assert [item.name for item in (mount / "blkio").iterdir()] == ["blkio.throttle.read_bps_device"]


def test_reasons_why_there_is_no_limit(tmp_path, ordinary_folders):
    memory = MemoryLimit(None)
    with pytest.raises(NoLimitError, match="no memory controller"):
        check_limits([memory], tmp_path)
    with pytest.raises(NoLimitError, match="no blkio or io controller"):
        check_limits([SLOW], tmp_path)
    second_version(tmp_path, controllers="cpu")
    with pytest.raises(NoLimitError, match="no memory controller"):
        check_limits([memory], tmp_path)
    with pytest.raises(NoLimitError, match="no blkio or io controller"):
        check_limits([SLOW], tmp_path)
    shutil.rmtree(tmp_path / "sys")
    first_version(tmp_path)
    with pytest.raises(NoLimitError, match="limits of memory need a control group: run as root"):
        check_limits([memory], tmp_path, is_root=lambda: False)
    with pytest.raises(NoLimitError, match="limits of a disk's rate need a control group: run as root"):
        check_limits([SLOW], tmp_path, is_root=lambda: False)
    check_limits([memory, SLOW], tmp_path, is_root=lambda: True)


def block_device(root, numbers, folder, partition=None):
    """A device in a /sys of ours, linked as the kernel links it."""
    device = root / "sys/devices" / folder
    device.mkdir(parents=True, exist_ok=True)
    (device / "dev").write_text(f"{numbers}\n")
    if partition is not None:
        (device / "partition").write_text(f"{partition}\n")
    link = root / "sys/dev/block" / numbers
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(device)


@pytest.fixture
def on_device(monkeypatch):
    """Makes every path lie on the device of these numbers."""

    def put(major, minor):
        monkeypatch.setattr("disk_rate.os.major", lambda _: major)
        monkeypatch.setattr("disk_rate.os.minor", lambda _: minor)

    return put


def test_a_partition_stands_for_its_disk(tmp_path, on_device):
    block_device(tmp_path, "8:0", "pci/block/sda")
    block_device(tmp_path, "8:2", "pci/block/sda/sda2", partition=2)
    on_device(8, 2)
    assert disk_of(tmp_path, tmp_path) == "8:0"
    on_device(8, 0)
    assert disk_of(tmp_path, tmp_path) == "8:0"


def test_what_is_on_no_disk_is_told_with_its_kind(tmp_path, on_device):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text(
        "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n30 25 0:27 / /dev/shm rw shared:4 - tmpfs tmpfs rw\n"
    )
    on_device(0, 27)
    with pytest.raises(NoLimitError, match=f"{tmp_path} is on tmpfs, which is no block device"):
        disk_of(tmp_path, tmp_path)


def test_a_real_group_stops_what_is_too_large():
    try:
        check_limits([MemoryLimit(None)])
    except NoLimitError as reason:
        pytest.skip(str(reason))
    with control_group([MemoryLimit(64 << 20)]) as group:
        command = [*group.launcher, sys.executable, "-c", "x = bytearray(256 << 20)"]
        done = subprocess.run(command, capture_output=True, check=False)
        assert done.returncode == -9
        assert group.num_reclaims > 0
    assert not any(folder.exists() for folder in group.folders.values())


def test_a_real_group_holds_a_disk_to_a_rate(tmp_path):
    weights = tmp_path / "weights"
    weights.write_bytes(bytes(4 << 20))
    try:
        limit = ReadLimit(disk_of(weights), 800_000_000)
        check_limits([limit])
    except NoLimitError as reason:
        pytest.skip(str(reason))
    with control_group([limit]) as group:
        (folder,) = group.folders.values()
        files = [folder / name for name in ("blkio.throttle.read_bps_device", "io.max")]
        (text,) = [file.read_text() for file in files if file.exists()]
        assert text.split()[:2] in ([limit.disk, "800000000"], [limit.disk, "rbps=800000000"])
        script = "import sys; print(open('/proc/self/cgroup').read(), len(open(sys.argv[1], 'rb').read()))"
        command = [*group.launcher, sys.executable, "-c", script, str(weights)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert f"/{folder.name}\n" in done.stdout
        assert done.stdout.split()[-1] == str(4 << 20)
    assert not folder.exists()
