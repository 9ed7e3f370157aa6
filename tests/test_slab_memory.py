import gc
import itertools
import mmap
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_device import FakePageLock

from moe_offload.errors import BudgetError
from moe_offload.offload.streaming import slab as slab_module
from moe_offload.offload.streaming.slab import Slab

PAGE = mmap.PAGESIZE


def test_slots_are_apart_and_aligned():
    with Slab(3, 2 * PAGE) as slab:
        for slot in range(3):
            slab.memory(slot)[:] = bytes([slot + 1]) * (2 * PAGE)
        for slot in range(3):
            tensor = slab.tensor(slot)
            assert tensor.dtype == torch.uint8
            assert tensor.shape == (2 * PAGE,)
            assert tensor.data_ptr() % PAGE == 0
            assert (tensor == slot + 1).all()


def test_tensor_and_memory_are_the_same_bytes():
    with Slab(2, PAGE) as slab:
        slab.tensor(1)[5] = 7
        assert slab.memory(1)[5] == 7
        assert slab.tensor(1).data_ptr() == slab.tensor(0).data_ptr() + PAGE


@pytest.mark.parametrize("slot", [-1, 2])
def test_a_slot_that_is_not_there(slot):
    with Slab(2, PAGE) as slab:
        with pytest.raises(IndexError, match=f"slot {slot} of 2"):
            slab.memory(slot)
        with pytest.raises(IndexError, match=f"slot {slot} of 2"):
            slab.tensor(slot)


@pytest.mark.parametrize(("num_slots", "slot_bytes"), [(0, PAGE), (1, 0), (1, PAGE + 1), (-1, PAGE)])
def test_impossible_sizes(num_slots, slot_bytes):
    with pytest.raises(ValueError, match="whole pages"):
        Slab(num_slots, slot_bytes)


def test_views_outlive_the_slab():
    slab = Slab(2, PAGE)
    tensor, memory = slab.tensor(1), slab.memory(1)
    tensor.fill_(9)
    slab.close()
    slab.close()
    del slab
    gc.collect()
    assert (tensor == 9).all()
    assert bytes(memory) == b"\x09" * PAGE


def test_a_closed_slab_gives_no_slots():
    slab = Slab(1, PAGE)
    slab.close()
    with pytest.raises(ValueError, match="closed"):
        slab.tensor(0)


def test_more_than_the_system_gives():
    with pytest.raises(BudgetError, match=r"refuses .* for 1 expert slots") as caught:
        Slab(1, 1 << 60)
    assert caught.value.needed_bytes == 1 << 60


def test_pinned():
    page_lock = FakePageLock()
    slab = Slab(2, PAGE, page_lock=page_lock)
    assert slab.num_pinned_slots == 2
    assert slab.pin_failure is None
    assert page_lock.locked == {slab.tensor(0).data_ptr(): 2 * PAGE}
    slab.close()
    slab.close()
    assert not page_lock.locked
    assert slab.num_pinned_slots == 0


def test_as_many_pieces_are_pinned_as_the_system_allows(monkeypatch):
    monkeypatch.setattr(slab_module, "_LOCKED_AT_ONCE_BYTES", 5 * PAGE)
    page_lock = FakePageLock(limit_bytes=8 * PAGE)
    with Slab(7, 2 * PAGE, page_lock=page_lock) as slab:
        assert slab.num_pinned_slots == 4, "two pieces of two slots, and no slot in two pieces"
        assert list(page_lock.locked) == [slab.tensor(0).data_ptr(), slab.tensor(2).data_ptr()]
        assert "ulimit -l" in slab.pin_failure
        slab.tensor(6).fill_(1)
    assert not page_lock.locked


def test_pinned_memory_is_not_forked():
    """Else the pages that a device reads would be left to the child at the parent's next write."""

    def flags(slab):
        smaps = Path("/proc/self/smaps").read_text().split("VmFlags:")
        address = slab.tensor(0).data_ptr()
        for mapping, after in itertools.pairwise(smaps):
            begin, end = (int(number, 16) for number in re.findall(r"^([0-9a-f]+)-([0-9a-f]+) ", mapping, re.M)[-1])
            if begin <= address < end:
                return after.partition("\n")[0].split()
        raise AssertionError

    with Slab(2, PAGE, page_lock=FakePageLock()) as pinned, Slab(2, PAGE) as pageable:
        assert "dc" in flags(pinned)  # do not copy on fork
        assert "dc" not in flags(pageable)


MEASURE = """
import psutil
from moe_offload.offload.streaming.slab import Slab

rss = psutil.Process().memory_info
MIB, SLOT = 1 << 20, 3 << 20
slab = Slab(200, SLOT)
slab.tensor(0)[:4096].fill_(1)
start = rss().rss
for slot in (50, 100, 150):
    slab.tensor(slot).fill_(1)
touched = rss().rss - start
slab.close()
print(touched // 4096, (rss().rss - start) // 4096)
"""


def test_untouched_slots_cost_nothing():
    """Three slots of 3 MiB touched of 200: at most a huge page of 2 MiB more at either end of each."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    touched_pages, closed_pages = map(int, done.stdout.split())
    assert 9 * 256 <= touched_pages <= (9 + 3 * 4 + 1) * 256
    assert closed_pages <= 256
