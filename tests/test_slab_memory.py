import gc
import mmap
import subprocess
import sys

import pytest
import torch

from moe_offload.errors import BudgetError
from moe_offload.offload.streaming.slab import Slab

PAGE = mmap.PAGESIZE


class FakeCuda:
    """Stands in for the CUDA runtime."""

    def __init__(self, status=0, failure=None):
        self.status = status
        self.failure = failure
        self.calls = []

    def cudaHostRegister(self, address, size_bytes, flags):
        self.calls.append(("register", address, size_bytes))
        if self.failure:
            raise self.failure
        return self.status

    def cudaHostUnregister(self, address):
        self.calls.append(("unregister", address))
        return 0


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
    cuda = FakeCuda()
    slab = Slab(2, PAGE, pin=True, cuda_host=cuda)
    assert slab.pinned
    assert slab.pin_failure is None
    address = slab.tensor(0).data_ptr()
    slab.close()
    slab.close()
    assert cuda.calls == [("register", address, 2 * PAGE), ("unregister", address)]
    assert not slab.pinned


@pytest.mark.parametrize(
    ("cuda", "reason"),
    [(FakeCuda(status=2), "CUDA error 2"), (FakeCuda(failure=RuntimeError("no driver")), "no driver")],
)
def test_pinning_that_fails_leaves_pageable_memory(cuda, reason):
    with Slab(1, PAGE, pin=True, cuda_host=cuda) as slab:
        assert not slab.pinned
        assert reason in slab.pin_failure
        slab.tensor(0).fill_(1)
    assert [call[0] for call in cuda.calls] == ["register"]


def test_pinning_without_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with Slab(1, PAGE, pin=True) as slab:
        assert not slab.pinned
        assert slab.pin_failure == "there is no CUDA device"


@pytest.mark.gpu
def test_pinned_for_real():
    with Slab(4, 1 << 20, pin=True) as slab:
        assert slab.pinned, slab.pin_failure
        assert slab.tensor(3).is_pinned()
        slab.tensor(3).fill_(5)
        copy = slab.tensor(3).to("cuda", non_blocking=True)
        torch.cuda.current_stream().synchronize()
        assert (copy == 5).all()


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
