"""How many threads the kernels use: torch's number, also while a thread keeps torch itself to one."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_here = threading.local()  # num: what this thread has asked torch for, while it keeps torch to one
_kept: list[int] = []  # the numbers of all threads that do


def num_threads() -> int:
    """Threads that kernels may use, as `torch.set_num_threads` has it."""
    return getattr(_here, "num", None) or torch.get_num_threads()


@contextmanager
def torch_on_one_thread() -> Iterator[None]:
    """In this thread torch computes alone, and wakes nobody; kernels go on with as many threads as they had."""
    if getattr(_here, "num", None) is not None:
        yield
        return
    with _lock:
        num = _asked()
        _kept.append(num)
        _here.num = num
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _kept.remove(num)
            _here.num = None
            torch.set_num_threads(num)


@contextmanager
def torch_on_all_threads() -> Iterator[None]:
    """Inside `torch_on_one_thread`, for work that is worth sharing out: torch has its threads back meanwhile."""
    num: int | None = getattr(_here, "num", None)
    if num is None:
        _undo_others()
        yield
        return
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def _undo_others() -> None:
    """Undo what `torch_on_one_thread` of another thread does to one that meets torch for the first time meanwhile."""
    with _lock:
        if (num := _asked()) != torch.get_num_threads():
            torch.set_num_threads(num)


def _asked() -> int:
    """A thread begins with what any thread set last, so with one where that was meant for that other alone."""
    num = torch.get_num_threads()
    return _kept[0] if num == 1 and _kept else num
