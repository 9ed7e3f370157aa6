"""A device made up for tests: streams whose work is done late, in any order that streams and events allow.

`FakeDevice` is a `DeviceQueue`. Nothing that is enqueued happens until `step` does one thing, drawn by a seeded random
generator among all that may happen next. Copies take several steps and leave rubbish in the target until the last.
What a real device would do silently is found out: a hazard is noted whenever memory changes under somebody.
"""

import random
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch

from moe_offload.offload.tiers.link_meter import LinkMeter

RUBBISH = 0xEE
DISK = "the disk"


class Mark:
    """One recording of an event."""

    def __init__(self) -> None:
        self.reached = False


class FakeEvent:
    def __init__(self, device: "FakeDevice") -> None:
        self.device = device
        self.mark: Mark | None = None

    def is_over(self) -> bool:
        self.device.drift()
        return self.mark is None or self.mark.reached

    def wait(self) -> None:
        self.device.run_until(self.mark)


class FakeStamp:
    """A mark in the copy stream that keeps the time at which the device came to it."""

    def __init__(self, device: "FakeDevice") -> None:
        self.device = device
        self.mark: Mark | None = None
        self.at_ns = 0

    def set(self) -> None:
        self.mark = Mark()
        self.device._enqueue("copy", self.device._stamping(self, self.mark))

    def is_over(self) -> bool:
        return self.mark is not None and self.mark.reached

    def ns_until(self, later: "FakeStamp") -> int:
        assert self.is_over()
        assert later.is_over()
        return later.at_ns - self.at_ns


class Access:
    """Somebody reads or writes memory for a while."""

    def __init__(self, who: str, data: torch.Tensor, writes: bool) -> None:
        self.who, self.writes = who, writes
        self.begin = data.data_ptr()
        self.end = self.begin + data.numel() * data.element_size()

    def conflicts(self, other: "Access") -> bool:
        return (self.writes or other.writes) and self.begin < other.end and other.begin < self.end


class FakePageLock:
    """Page-locks anything, or nothing past ``limit_bytes``."""

    def __init__(self, limit_bytes: int | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.locked: dict[int, int] = {}

    def lock(self, address: int, size_bytes: int) -> str | None:
        if self.limit_bytes is not None and sum(self.locked.values()) + size_bytes > self.limit_bytes:
            return "refused; `ulimit -l` bounds it"
        self.locked[address] = size_bytes
        return None

    def unlock(self, address: int) -> None:
        del self.locked[address]


class FakeDevice:
    """``eager``: kernels are ordinary torch calls, done when they are made; only copies are late."""

    def __init__(
        self,
        seed: int = 0,
        *,
        eager: bool = False,
        page_lock: FakePageLock | None = None,
        beside: "FakeDevice | None" = None,
    ) -> None:
        """``beside``: another device that uses the same host memory."""
        self.page_lock = page_lock or FakePageLock()
        self.random = random.Random(seed)
        self.current = "compute"
        self.hazards: list[str] = []
        self.num_copies = 0
        self.link = LinkMeter(lambda: FakeStamp(self))
        self.clock_ns = 0  # a copy takes a nanosecond a byte, everything else nothing
        self.copy_s_per_byte = 0.0
        self.fail_copies = 0
        self.closed = False
        self.eager = eager
        self._lock = threading.RLock()
        self._streams: dict[str, deque[Iterator[Mark | None]]] = {"copy": deque()}
        self._blocked: dict[str, Mark | None] = {}
        self._accesses: list[Access] = [] if beside is None else beside._accesses
        self._calls: list[tuple[Mark, Callable[[], None]]] = []
        self._work = threading.Event()
        self._thread: threading.Thread | None = None

    # -- DeviceQueue --

    def allocate(self, size_bytes: int) -> torch.Tensor:
        return torch.full((size_bytes,), RUBBISH, dtype=torch.uint8)

    def new_event(self) -> FakeEvent:
        return FakeEvent(self)

    def copy(
        self,
        source: torch.Tensor,
        target: torch.Tensor,
        *,
        after: Iterable[FakeEvent],
        event: FakeEvent,
        is_ahead: bool = False,
    ) -> None:
        assert source.shape == target.shape
        assert not self.closed
        with self._lock:
            if self.fail_copies:
                self.fail_copies -= 1
                raise RuntimeError("CUDA error: unspecified launch failure")
            for earlier in after:
                self._enqueue("copy", self._waiting(earlier.mark))
            # The source is spoken for from now on, the target from when the copy begins.
            with self.link.copying(source.numel(), is_ahead=is_ahead):
                self._enqueue("copy", self._copying(source, target, self._enter("a copy", source, writes=False)))
            self._record(event, "copy")
            self.num_copies += 1

    def to_host(self, source: torch.Tensor, target: torch.Tensor, *, event: FakeEvent) -> None:
        self._move(source, target, event, "rows to the host")

    def to_device(self, source: torch.Tensor, target: torch.Tensor, *, event: FakeEvent) -> None:
        self._move(source, target, event, "rows to the device")

    def _move(self, source: torch.Tensor, target: torch.Tensor, event: FakeEvent, who: str) -> None:
        assert source.shape == target.shape
        assert source.dtype == target.dtype
        if self.eager:
            target.copy_(source)
        else:
            with self._lock:
                self._enqueue(self.current, self._moving(source, target, who))
        self.record(event)

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        with self._lock:
            work = self._copying(source, target, self._enter("a move", source, writes=False))
            if self.eager:
                list(work)
            else:
                self._enqueue(self.current, work)

    def stream(self) -> str:
        return self.current

    def wait(self, event: FakeEvent) -> None:
        if self.eager:
            event.wait()
        else:
            with self._lock:
                self._enqueue(self.current, self._waiting(event.mark))

    def record(self, event: FakeEvent) -> None:
        with self._lock:
            self._record(event, self.current)

    def when_over(self, event: FakeEvent, call: Callable[[], None]) -> None:
        assert event.mark is not None, "only recorded events are waited for"
        with self._lock:
            self._calls.append((event.mark, call))
            self._work.set()

    def close(self) -> None:
        with self._lock:
            while self._streams["copy"]:
                assert self._do_one(), "the copy stream waits for ever"
            self.closed = True
            self._calls.clear()
            self._work.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    # -- for tests --

    def kernel(self, data: torch.Tensor, check: Callable[[str], None]) -> None:
        """Launch something that reads ``data`` for a while and calls ``check`` when it begins and when it ends."""
        with self._lock:
            self._enqueue(self.current, self._computing(data, check))

    def cpu_reads(self, data: torch.Tensor, check: Callable[[str], None]) -> None:
        """This thread reads ``data`` for a while, and the device gets on meanwhile."""
        with self._lock:
            reading = self._enter("the CPU", data, writes=False)
        check("begin")
        self.drift()
        check("end")
        with self._lock:
            self._leave(reading)

    def disk_writes(self, data: torch.Tensor) -> None:
        """The disk is about to write there."""
        with self._lock:
            self._leave(self._enter(DISK, data, writes=True))

    def step(self) -> bool:
        """Do one thing that may happen next; False if there is none."""
        with self._lock:
            calls = [call for call in self._calls if call[0].reached]
            if calls and self.random.random() < 0.5:
                self._calls.remove(calls[0])
            elif self._do_one():
                return True
            elif not calls:
                return False
            else:
                self._calls.remove(calls[0])
        calls[0][1]()
        return True

    def drift(self) -> None:
        """Let the device get on, or not. Calls nobody back."""
        with self._lock:
            while self.random.random() < 0.5 and self._do_one():
                pass

    def run_until(self, mark: Mark | None) -> None:
        with self._lock:
            while mark is not None and not mark.reached:
                assert self._do_one(), "the device waits for ever"

    def run_in_background(self) -> None:
        """Step on a thread of its own until `close`."""

        def run() -> None:
            while not self.closed:
                if not self.step():
                    self._work.wait(0.05)
                    self._work.clear()

        self._thread = threading.Thread(target=run, name="fake-device", daemon=True)
        self._thread.start()

    @property
    def is_idle(self) -> bool:
        with self._lock:
            return not any(self._streams.values())

    # -- streams; the lock is held --

    def _enqueue(self, stream: str, work: Iterator[Mark | None]) -> None:
        self._streams.setdefault(stream, deque()).append(work)
        self._work.set()

    def _record(self, event: FakeEvent, stream: str) -> None:
        event.mark = Mark()
        if self.eager and stream != "copy":
            event.mark.reached = True
        else:
            self._enqueue(stream, self._reaching(event.mark))

    def _do_one(self) -> bool:
        """One step of what is first in some stream. Work is a generator of marks that it waits for, or None."""
        ready = []
        for name, works in self._streams.items():
            mark = self._blocked.get(name)
            if works and (mark is None or mark.reached):
                ready.append(name)
        if not ready:
            return False
        name = self.random.choice(ready)
        works = self._streams[name]
        try:
            self._blocked[name] = next(works[0])
        except StopIteration:
            works.popleft()
            self._blocked[name] = None
        return True

    def _waiting(self, mark: Mark | None) -> Iterator[Mark | None]:
        if mark is not None:
            yield mark

    def _reaching(self, mark: Mark) -> Iterator[None]:
        mark.reached = True
        yield None

    def _stamping(self, stamp: FakeStamp, mark: Mark) -> Iterator[None]:
        stamp.at_ns = self.clock_ns
        mark.reached = True
        yield None

    def _copying(self, source: torch.Tensor, target: torch.Tensor, reading: Access) -> Iterator[None]:
        writing = self._enter("a copy", target, writes=True)
        half = source.numel() // 2
        target.fill_(RUBBISH)
        yield None
        target[:half] = source[:half]
        yield None
        target[half:] = source[half:]
        self.clock_ns += source.numel()
        self._leave(writing)
        self._leave(reading)

    def _moving(self, source: torch.Tensor, target: torch.Tensor, who: str) -> Iterator[None]:
        accesses = [self._enter(who, source, writes=False), self._enter(who, target, writes=True)]
        target.view(torch.uint8).fill_(RUBBISH)
        yield None
        target.copy_(source)
        for access in accesses:
            self._leave(access)

    def _computing(self, data: torch.Tensor, check: Callable[[str], None]) -> Iterator[None]:
        reading = self._enter("a kernel", data, writes=False)
        check("begin")
        yield None
        check("end")
        self._leave(reading)

    def _enter(self, who: str, data: torch.Tensor, *, writes: bool) -> Access:
        access = Access(who, data, writes)
        for other in self._accesses:
            if access.conflicts(other):
                verbs = ["writes" if a.writes else "reads" for a in (access, other)]
                self.hazards.append(f"{who} {verbs[0]} what {other.who} {verbs[1]}")
        self._accesses.append(access)
        return access

    def _leave(self, access: Access) -> None:
        self._accesses.remove(access)
