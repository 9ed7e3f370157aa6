"""What page-locking asks of the CUDA runtime, with its calls written down instead of made."""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_offload.offload.tiers.cuda_page_lock import CudaPageLock

DEVICE = torch.device("cuda", 1)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """``status`` and ``failure`` of the next registration are those of the runtime in the fixture's first entry."""
    entries: list[Any] = [SimpleNamespace(status=0, failure=None)]
    runtime = entries[0]

    def register(address: int, size_bytes: int, flags: int) -> int:
        entries.append(("register", address, size_bytes))
        if runtime.failure:
            raise runtime.failure
        return runtime.status

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        entries.append(("on", chosen))
        yield
        entries.append(("off", chosen))

    def ones(size: int, *, device: torch.device) -> None:
        entries.append(("launch", device))
        raise RuntimeError("CUDA error: out of memory")

    runtime.cudaHostRegister = register
    runtime.cudaHostUnregister = lambda address: entries.append(("unregister", address))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch, "ones", ones)
    return entries


def test_locks_for_its_device_and_no_other(log: list[Any]):
    page_lock = CudaPageLock(DEVICE)
    assert page_lock.lock(4096, 8192) is None
    page_lock.unlock(4096)
    assert log[1:] == [
        ("on", DEVICE),
        ("register", 4096, 8192),
        ("off", DEVICE),
        ("on", DEVICE),
        ("unregister", 4096),
        ("off", DEVICE),
    ]


def test_a_refusal_says_why_and_leaves_no_error_to_others(log: list[Any]):
    log[0].status = 2
    reason = CudaPageLock(DEVICE).lock(4096, 3 << 30)
    assert "refused 3.0 GiB with CUDA error 2; `ulimit -l`" in reason
    assert log[-1] == ("launch", DEVICE)


def test_no_driver(log: list[Any]):
    log[0].failure = RuntimeError("no driver")
    assert "no driver" in CudaPageLock(DEVICE).lock(4096, 4096)


@pytest.mark.gpu
def test_for_real():
    inside = torch.frombuffer(mmap.mmap(-1, 1 << 19), dtype=torch.uint8).fill_(5)
    page_lock = CudaPageLock(torch.device("cuda", torch.cuda.current_device()))
    address = inside.data_ptr()  # where its storage begins too, by which torch asks whether it is page-locked
    assert page_lock.lock(address, 1 << 19) is None
    assert inside.is_pinned()
    assert page_lock.lock(address, 1 << 19) is not None, "what is locked already is refused"
    assert (inside.to("cuda", non_blocking=True) == 5).all(), "the refusal does not strike what comes after"
    page_lock.unlock(address)
    assert not inside.is_pinned()
