"""What the CUDA queue asks of torch, with torch's CUDA calls written down instead of made."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_offload.errors import BudgetError, ExpertCopyError
from moe_offload.offload.tiers.cuda_queue import CudaQueue
from moe_offload.offload.tiers.link_meter import LinkTotals

Log = list[tuple[Any, ...]]


class Calls:
    """Stands in for torch.cuda; ``log`` has what was asked, ``fail`` makes a call of that name raise."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        calls = self
        self.log: Log = []
        self.fail: set[str] = set()
        self.out_of_memory = self.late = False

        def note(*entry: Any) -> None:
            self.log.append(entry)
            if entry[0] in self.fail:
                raise RuntimeError(f"CUDA error in {entry[0]}")

        class Event:
            def __init__(self, blocking: bool = False, enable_timing: bool = False) -> None:
                assert blocking != enable_timing, "a thread that waits is not to spin; for stamps nobody waits"
                self.is_timed = enable_timing

            def record(self, stream: Any) -> None:
                note("stamp" if self.is_timed else "record", stream)

            def elapsed_time(self, end: Any) -> float:
                assert self.is_timed
                assert end.is_timed
                return 2.0

            def query(self) -> bool:
                note("query")
                return not calls.late

            def synchronize(self) -> None:
                note("wait for event")

        class Stream:
            def __init__(self, name: Any) -> None:
                self.name = name
                self.cuda_stream = id(self)

            def __repr__(self) -> str:
                return "copies" if isinstance(self.name, torch.device) else str(self.name)

            def wait_event(self, event: Any) -> None:
                note("stream waits", self, event)

            def wait_stream(self, stream: Any) -> None:
                note("stream follows", self, stream)

            def synchronize(self) -> None:
                note("synchronize", self)

        @contextmanager
        def within(what: Any) -> Iterator[None]:
            calls.log.append(("on", what))
            yield
            calls.log.append(("off", what))

        self.compute = Stream("compute")

        def empty(size_bytes: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
            if self.out_of_memory:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            note("empty", size_bytes, device)
            return torch.zeros(size_bytes, dtype=dtype)

        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "stream", within)
        patch.setattr(torch.cuda, "device", within)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "current_stream", lambda device: self.compute)
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 2 << 30))
        patch.setattr(torch, "empty", empty)

    def names(self) -> list[str]:
        return [f"{entry[0]} {entry[1]}" if len(entry) > 1 else entry[0] for entry in self.log]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def target_that(calls: Calls) -> Any:
    def copy_(source: Any, non_blocking: bool) -> None:
        assert non_blocking
        calls.log.append(("copy",))
        if "copy" in calls.fail:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    return SimpleNamespace(copy_=copy_)


def test_a_copy_waits_on_its_stream_and_is_marked(calls: Calls):
    queue = CudaQueue(torch.device("cuda"))
    assert queue.device == torch.device("cuda", 0)
    earlier, event = queue.new_event(), queue.new_event()
    queue.copy(torch.zeros(1), target_that(calls), after=[earlier], event=event)
    assert calls.names() == [
        "on cuda:0",  # else leaving the stream would set up the device that this thread began with
        "on copies",
        "stream waits copies",
        "stamp copies",
        "copy",
        "stamp copies",
        "record copies",
        "off copies",
        "off cuda:0",
    ]
    assert calls.log[2][2] is earlier.event


def test_every_copy_is_timed_and_nobody_waits_for_it(calls: Calls):
    queue = CudaQueue(torch.device("cuda:1"))

    def copy(size_bytes: int) -> list[str]:
        calls.log.clear()
        source = torch.zeros(size_bytes, dtype=torch.uint8)
        queue.copy(source, target_that(calls), after=[], event=queue.new_event(), is_ahead=size_bytes < 2000)
        return [name for name in calls.names() if not name.startswith("o")]

    timed = ["stamp copies", "copy", "stamp copies", "record copies"]
    assert copy(1000) == timed
    calls.late = True
    assert copy(1 << 20) == ["query", *timed]
    assert queue.link.totals() == LinkTotals(1 << 20, 1000, 0)
    calls.late = False
    assert copy(1 << 20) == ["query", "query", *timed]
    assert queue.link.totals() == LinkTotals(2 << 20, 1000, 6_000_000)
    assert queue.copy_s_per_byte == pytest.approx(2e-3 / (1 << 20))


def test_rows_go_both_ways_on_the_callers_stream(calls: Calls):
    queue = CudaQueue(torch.device("cuda:1"))
    for move in (queue.to_host, queue.to_device):
        calls.log.clear()
        move(torch.zeros(1), target_that(calls), event=queue.new_event())
        assert calls.names() == ["on cuda:1", "copy", "record compute", "off cuda:1"]


def test_kernels_are_ordered_on_the_callers_stream(calls: Calls):
    queue = CudaQueue(torch.device("cuda:1"))
    event = queue.new_event()
    queue.wait(event)
    queue.record(event)
    assert calls.names() == ["stream waits compute", "record compute"]
    assert queue.stream() == calls.compute.cuda_stream


def test_memory_is_written_only_after_its_earlier_users(calls: Calls):
    queue = CudaQueue(torch.device("cuda:1"))
    assert queue.allocate(64).numel() == 64
    assert calls.names() == ["empty 64", "stream follows copies"]
    assert calls.log[0][2] == torch.device("cuda:1")
    assert calls.log[1][2] is calls.compute


def test_what_the_device_has_no_room_for_is_refused_with_numbers(calls: Calls):
    calls.out_of_memory = True
    with pytest.raises(BudgetError, match=r"refuses 3\.0 GiB .*1\.0 GiB free.*--vram") as refusal:
        CudaQueue(torch.device("cuda")).allocate(3 << 30)
    assert refusal.value.budget_bytes == 1 << 30


def test_failures_are_typed_and_the_mark_is_set_all_the_same(calls: Calls):
    queue = CudaQueue(torch.device("cuda"))
    calls.fail = {"copy", "query", "wait for event"}
    event = queue.new_event()
    with pytest.raises(ExpertCopyError, match=r"illegal memory access.*nvidia-smi"):
        queue.copy(torch.zeros(1), target_that(calls), after=[], event=event)
    assert "record copies" in calls.names()
    for ask in (event.is_over, event.wait):
        with pytest.raises(ExpertCopyError, match="nvidia-smi"):
            ask()


@pytest.mark.parametrize("failing", [set(), {"wait for event"}])
def test_calls_back_on_another_thread_even_if_the_device_fails(calls: Calls, failing: set[str]):
    queue = CudaQueue(torch.device("cuda"))
    calls.fail = failing
    done = threading.Event()
    threads: list[threading.Thread] = []

    def call() -> None:
        threads.append(threading.current_thread())
        done.set()

    def broken() -> None:
        raise ValueError

    queue.when_over(queue.new_event(), broken)
    queue.when_over(queue.new_event(), call)
    assert done.wait(30)
    assert threads[0] is not threading.current_thread()
    queue.close()
    assert not threads[0].is_alive()
    queue.when_over(queue.new_event(), pytest.fail)
    queue.close()
    assert calls.names()[-1] == "synchronize copies"
