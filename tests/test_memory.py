import subprocess
import sys

import psutil
import pytest

from moe_offload.offload.planning.memory import (
    Memory,
    peak_rss_bytes,
    ram_budget_bytes,
    ram_memory,
    reset_peak_rss,
    rss_bytes,
    vram_budget_bytes,
)

GIB = 1024**3
MIB = 1024**2


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine of 64 GiB, 48 of them free."""
    memory = type("svmem", (), {"total": 64 * GIB, "available": 48 * GIB})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def v2(group, limit, used, cache=0):
    folder = f"sys/fs/cgroup/{group}".rstrip("/")
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": f"anon 5\ninactive_file {cache}\nactive_file 7\n",
    }


def v1(group, limit, used, cache=0):
    folder = f"sys/fs/cgroup/memory/{group}".rstrip("/")
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{used}\n",
        f"{folder}/memory.stat": f"cache 9\ninactive_file 1\ntotal_inactive_file {cache}\n",
    }


def test_without_control_groups_it_is_the_machines(tmp_path):
    assert ram_memory(tmp_path) == Memory(64 * GIB, 48 * GIB)


def test_cgroup_v2_limit_less_what_is_used_but_not_page_cache(tmp_path):
    write(tmp_path, {"proc/self/cgroup": "0::/app\n", **v2("app", 8 * GIB, 5 * GIB, 2 * GIB)})
    assert ram_memory(tmp_path) == Memory(8 * GIB, 5 * GIB)


def test_cgroup_v2_max_is_no_limit(tmp_path):
    write(tmp_path, {"proc/self/cgroup": "0::/app\n", **v2("app", "max", 5 * GIB)})
    assert ram_memory(tmp_path) == Memory(64 * GIB, 48 * GIB)


def test_an_ancestors_limit_counts(tmp_path):
    files = {**v2("slice/app", "max", 1 * GIB), **v2("slice", 4 * GIB, 3 * GIB)}
    write(tmp_path, {"proc/self/cgroup": "0::/slice/app\n", **files})
    assert ram_memory(tmp_path) == Memory(4 * GIB, 1 * GIB)


def test_a_container_that_sees_only_the_root_of_its_group(tmp_path):
    write(tmp_path, {"proc/self/cgroup": "0::/host/path/not/mounted\n", **v2("", 2 * GIB, 1 * GIB)})
    assert ram_memory(tmp_path) == Memory(2 * GIB, 1 * GIB)


def test_cgroup_v1_limit(tmp_path):
    lines = "5:cpu,cpuacct:/app\n4:memory:/app\n0::/app\n"
    write(tmp_path, {"proc/self/cgroup": lines, **v1("app", 3 * GIB, 2 * GIB, 1 * GIB)})
    assert ram_memory(tmp_path) == Memory(3 * GIB, 2 * GIB)


def test_cgroup_v1_says_unlimited_with_a_huge_number(tmp_path):
    write(tmp_path, {"proc/self/cgroup": "4:memory:/app\n", **v1("app", 9223372036854771712, 2 * GIB)})
    assert ram_memory(tmp_path) == Memory(64 * GIB, 48 * GIB)


def test_more_used_than_the_limit_is_nothing_free(tmp_path):
    write(tmp_path, {"proc/self/cgroup": "0::/app\n", **v2("app", 2 * GIB, 3 * GIB)})
    assert ram_memory(tmp_path) == Memory(2 * GIB, 0)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("auto", int(48 * GIB * 0.9)),
        ("50%", 32 * GIB),
        ("6GiB", 6 * GIB),
        ("100GiB", 64 * GIB),  # never more than there is
        (123, 123),
    ],
)
def test_ram_budget(size, expected):
    assert ram_budget_bytes(size, Memory(64 * GIB, 48 * GIB)) == pytest.approx(expected, abs=1)


def test_auto_margins_have_a_floor():
    assert ram_budget_bytes("auto", Memory(8 * GIB, 4 * GIB)) == 3 * GIB
    assert ram_budget_bytes("auto", Memory(8 * GIB, GIB // 2)) == 0
    assert vram_budget_bytes("auto", Memory(8 * GIB, 4 * GIB)) == 4 * GIB - 512 * MIB
    assert vram_budget_bytes("auto", Memory(80 * GIB, 50 * GIB)) == pytest.approx(47 * GIB, abs=1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_the_peak_is_remembered_and_reset():
    # In a process of its own: the peak of this one depends on the tests before.
    script = (
        "from moe_offload.offload.planning.memory import peak_rss_bytes, reset_peak_rss, rss_bytes\n"
        "before = rss_bytes()\n"
        "block = bytearray(b'x') * (96 << 20)\n"
        "assert rss_bytes() - before > 90 << 20\n"
        "del block\n"
        "assert peak_rss_bytes() - before > 90 << 20\n"
        "if reset_peak_rss():\n"
        "    assert peak_rss_bytes() - before < 60 << 20, peak_rss_bytes() - before\n"
        "assert 'torch' not in __import__('sys').modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_peak_is_at_least_what_is_held():
    reset_peak_rss()
    peak = peak_rss_bytes()
    assert peak is None or peak >= rss_bytes() - MIB
