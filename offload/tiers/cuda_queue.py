"""The device queue of a CUDA device: torch's streams and events."""

import contextlib
import queue
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from logging import getLogger

import torch

from moe_offload.errors import BudgetError, ExpertCopyError
from moe_offload.offload.planning.sizes import format_size
from moe_offload.offload.tiers.cuda_page_lock import CudaPageLock
from moe_offload.offload.tiers.device_queue import Event
from moe_offload.offload.tiers.link_meter import LinkMeter

_log = getLogger(__name__)


@contextlib.contextmanager
def _typed(doing: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ExpertCopyError(
            f"the CUDA device failed while {doing}: {error}; check it (nvidia-smi, dmesg) and start again"
        ) from error


class CudaEvent:
    """A CUDA event whose waits sleep instead of spinning."""

    def __init__(self, device: torch.device) -> None:
        self.event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self.device = device

    def is_over(self) -> bool:
        """Whether the device has come past the mark; true if it was never recorded."""
        # Without the guard, a thread's first question would set up the first device too.
        with _typed("it was asked about a copy"), torch.cuda.device(self.device):
            return bool(self.event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Block this thread until it has."""
        with _typed("a copy was awaited"), torch.cuda.device(self.device):
            self.event.synchronize()


class _CudaStamp:
    """An event in the copy stream that the device stamps with its time."""

    def __init__(self, stream: torch.cuda.Stream, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._stream, self._device = stream, device

    def set(self) -> None:
        self._event.record(self._stream)

    def is_over(self) -> bool:
        with torch.cuda.device(self._device):  # as for `CudaEvent.is_over`
            return bool(self._event.query())  # type: ignore[no-untyped-call]

    def ns_until(self, later: "_CudaStamp") -> int:
        elapsed_ms: float = self._event.elapsed_time(later._event)
        return round(elapsed_ms * 1e6)


class CudaQueue:
    """See `DeviceQueue`. One copy stream; compute streams are torch's current ones, each thread's own."""

    def __init__(self, device: torch.device) -> None:
        """``device``: "cuda" or "cuda:N"."""
        index = device.index if device.index is not None else torch.cuda.current_device()
        self.device = torch.device("cuda", index)
        self.page_lock = CudaPageLock(self.device)
        self._copy_stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self.link = LinkMeter(self._new_stamp)
        self._lock = threading.Lock()
        self._calls: queue.SimpleQueue[tuple[CudaEvent, Callable[[], None]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """Device memory, which the copy stream may write to once earlier users of it are through."""
        try:
            memory = torch.empty(size_bytes, dtype=torch.uint8, device=self.device)
        except torch.cuda.OutOfMemoryError as error:
            free_bytes, _ = torch.cuda.mem_get_info(self.device)
            raise BudgetError(
                f"the device refuses {format_size(size_bytes)} for expert slots ({format_size(free_bytes)} free); "
                f"use a smaller --vram, or end what else uses the device",
                needed_bytes=size_bytes,
                budget_bytes=free_bytes,
            ) from error
        self._copy_stream.wait_stream(torch.cuda.current_stream(self.device))
        return memory

    def new_event(self) -> CudaEvent:
        """An event that is not recorded yet."""
        return CudaEvent(self.device)

    def _new_stamp(self) -> _CudaStamp:
        return _CudaStamp(self._copy_stream, self.device)

    def copy(
        self,
        source: torch.Tensor,
        target: torch.Tensor,
        *,
        after: Iterable[Event],
        event: Event,
        is_ahead: bool = False,
    ) -> None:
        """Asynchronous if ``source`` is page-locked; else the driver takes its bytes while this thread waits."""
        # The outer guard: without it, a thread that is new to CUDA would come back to the first device, and set it up.
        with _typed("a copy was begun"), torch.cuda.device(self.device), torch.cuda.stream(self._copy_stream):
            for earlier in after:
                self._copy_stream.wait_event(_cuda(earlier))
            try:
                with self.link.copying(source.numel(), is_ahead=is_ahead):
                    target.copy_(source, non_blocking=True)
            finally:
                _cuda(event).record(self._copy_stream)

    @property
    def copy_s_per_byte(self) -> float:
        """What a byte takes on the copy stream, from copies of late; 0 while that is not known."""
        return self.link.s_per_byte

    def to_host(self, source: torch.Tensor, target: torch.Tensor, *, event: Event) -> None:
        """On this thread's current stream; asynchronous if ``target`` is page-locked."""
        with _typed("rows were brought to the host"), torch.cuda.device(self.device):
            target.copy_(source, non_blocking=True)
            self.record(event)

    def to_device(self, source: torch.Tensor, target: torch.Tensor, *, event: Event) -> None:
        """On this thread's current stream; asynchronous if ``source`` is page-locked."""
        with _typed("rows were sent to the device"), torch.cuda.device(self.device):
            target.copy_(source, non_blocking=True)
            self.record(event)

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """On this thread's current stream."""
        with _typed("an expert was moved"), torch.cuda.device(self.device):
            target.copy_(source, non_blocking=True)

    def stream(self) -> Hashable:
        """This thread's current stream on the device."""
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def wait(self, event: Event) -> None:
        """This thread's current stream goes on only when the event is over; the thread itself does not wait."""
        torch.cuda.current_stream(self.device).wait_event(_cuda(event))

    def record(self, event: Event) -> None:
        """Put the mark behind all that was launched on this thread's current stream."""
        _cuda(event).record(torch.cuda.current_stream(self.device))

    def when_over(self, event: Event, call: Callable[[], None]) -> None:
        """Call back, on a thread that waits for one event after the other."""
        assert isinstance(event, CudaEvent), "events come from new_event"
        with self._lock:
            if self._closed:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="cuda-copies", daemon=True)
                self._thread.start()
            self._calls.put((event, call))

    def close(self) -> None:
        """Wait for the copies, and end the thread that calls back."""
        with self._lock:
            self._closed = True
            thread, self._thread = self._thread, None
        if thread is not None:
            self._calls.put(None)
            thread.join()
        with _typed("the last copies were awaited"):
            self._copy_stream.synchronize()

    def _run(self) -> None:
        while (waiting := self._calls.get()) is not None:
            event, call = waiting
            try:
                event.wait()
            except ExpertCopyError:
                _log.exception("a copy has failed")
            try:
                call()
            except Exception:
                _log.exception("what followed a copy has failed")


def _cuda(event: Event) -> torch.cuda.Event:
    assert isinstance(event, CudaEvent), "events come from new_event"
    return event.event
