"""Which chunk of which expert is read next: demand strictly before speculation. Decides only; moves no bytes."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from moe_offload.errors import ExpertReadError, MoeOffloadError
from moe_offload.offload.pack.manifest import SLOT_ALIGNMENT_BYTES, ExpertSpec
from moe_offload.offload.streaming.running_checksum import RunningChecksum

# Chunks of speculation read at once: as fast as more on one disk, and what a demand has to wait for when it comes.
MAX_SPECULATIVE_CHUNKS = 2

OnDone = Callable[[BaseException | None], None]
OnLanded = Callable[[], None]


def cut(size_bytes: int, chunk_bytes: int) -> tuple[range, ...]:
    """An expert as chunks of at most ``chunk_bytes``, as equal as whole pages let them be.

    A short last chunk would leave the disk with little to do beside the long one before it.
    """
    num_chunks = -(-size_bytes // chunk_bytes)
    pages = -(-size_bytes // (num_chunks * SLOT_ALIGNMENT_BYTES))
    return tuple(
        range(begin, min(begin + pages * SLOT_ALIGNMENT_BYTES, size_bytes))
        for begin in range(0, size_bytes, pages * SLOT_ALIGNMENT_BYTES)
    )


class ReadCancelledError(MoeOffloadError):
    """The read was speculative and has been cancelled; nothing writes into its slot any more."""


class ReadWatcher(Protocol):
    """Told by the reader's threads of what lands, always before the read is done; to be quick, and not to raise."""

    def chunk_landed(self, chunk: range) -> None:
        """These bytes are there, and not verified. Chunks come in any order, some perhaps before anybody watched."""

    def begins_again(self) -> None:
        """What has landed was wrong: all of it is read once more when this returns."""


class _Canceller(Protocol):
    def cancel(self, read: "Read") -> bool: ...
    def promote(self, read: "Read") -> bool: ...


class Read:
    """One expert on its way into a slot. The queue's lock guards the fields, its threads change them."""

    def __init__(
        self,
        queue: _Canceller,
        key: tuple[int, int],
        spec: ExpertSpec,
        into: memoryview,
        speculative: bool,
        on_done: OnDone | None,
        source: memoryview | None = None,
        order: Sequence[range] = (),
    ) -> None:
        """``order``: its chunks as they are to be read."""
        self.layer_idx, self.expert_idx = key
        self.spec = spec
        self.size_bytes = len(into)
        self.speculative = speculative
        self.into: memoryview | None = into  # dropped when settled, so that the reader holds no slot
        self.from_memory = source is not None
        self.source = source  # dropped when settled too
        self.on_done = on_done
        self.watcher: ReadWatcher | None = None
        self.error: MoeOffloadError | None = None
        self.queued = False  # chunks are left to hand out
        self.claimed = False  # one thread verifies or settles it
        self.order = order
        self.next_chunk = 0  # of the order
        self.next_bytes = 0  # how many were handed out
        self.num_landed = 0  # chunks, from the first of the order on
        self.on_landed: OnLanded | None = None
        self.checksum: RunningChecksum | None = None  # of what has landed, if it is to be verified
        self.in_flight = 0
        self.guessed_in_flight = 0  # those of them that were handed out as speculation
        self.rereads = 0
        self.is_guess = speculative  # as it was submitted: a promotion leaves it
        self.begin_ns = 0  # when its first chunk was begun, where somebody observes
        self.settled = threading.Event()
        self._landed: set[int] = set()  # where those chunks begin that are there
        self._queue = queue

    @property
    def name(self) -> str:
        """How messages call the expert."""
        return f"expert {self.expert_idx} of layer {self.layer_idx}"

    def done(self) -> bool:
        """Whether it is settled: whole and verified, failed, or cancelled."""
        return self.settled.is_set()

    def wait(self, timeout: float | None = None) -> None:
        """Return when the bytes are there and verified; raises what went wrong, or TimeoutError."""
        if not self.settled.wait(timeout):
            raise TimeoutError(f"{self.name} was not read within {timeout} s")
        if self.error is not None:
            # A new one for each waiter: a shared one would collect the tracebacks of several threads.
            raise type(self.error)(*self.error.args)

    def watch(self, on_landed: OnLanded) -> None:
        """Call ``on_landed`` on a reader's thread whenever ``num_landed`` has grown, and now if it is not 0.

        Until the read is settled, which tells whether what has landed is right: a second try sets it to 0.
        """
        self.on_landed = on_landed
        if self.num_landed:
            on_landed()

    def landed(self, chunk: range) -> None:
        """A chunk's bytes are there. For the queue, which holds its lock."""
        self._landed.add(chunk.start)
        while self.num_landed < len(self.order) and self.order[self.num_landed].start in self._landed:
            self.num_landed += 1

    def begin_again(self) -> None:
        """Nothing is there. For the queue likewise."""
        self.rereads += 1
        self.next_chunk = self.next_bytes = self.num_landed = 0
        self._landed.clear()
        if self.checksum is not None:
            self.checksum = RunningChecksum()

    def cancel(self) -> bool:
        """Give up a speculative read between chunks; True if it will not deliver.

        The slot is free once the read is done, not before: chunks in flight still write into it.
        """
        return self._queue.cancel(self)

    def promote(self) -> bool:
        """Make a speculative read a demand; False if it was cancelled or failed and must be submitted anew."""
        return self._queue.promote(self)


class ReadQueue:
    """Hands out chunks to threads, and every read exactly once to the thread that is to conclude it."""

    def __init__(self) -> None:
        """An open, empty queue."""
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._demand: deque[Read] = deque()
        self._speculation: deque[Read] = deque()
        self._given_up: deque[Read] = deque()
        self._unsettled: set[Read] = set()
        self._num_guessed_chunks = 0
        self._closed_because: str | None = None

    def add(self, read: Read) -> None:
        """Queue a new read; raises ExpertReadError when the queue is closed."""
        with self._lock:
            if self._closed_because is not None:
                raise self._closed_error(read)
            self._unsettled.add(read)
            self._enqueue(read)

    def take(self) -> tuple[Read, range | None] | None:
        """Wait for work: a chunk to read, or None for a read that was given up and is to be concluded.

        None instead of both when the queue is closed and nothing is left.
        """
        with self._lock:
            while True:
                if self._given_up:
                    return self._given_up.popleft(), None
                if self._demand:
                    return self._next_chunk(self._demand)
                if self._speculation and self._num_guessed_chunks < MAX_SPECULATIVE_CHUNKS:
                    return self._next_chunk(self._speculation)
                if self._closed_because is not None:
                    return None
                self._work.wait()

    def chunk_ended(self, read: Read, chunk: range, error: MoeOffloadError | None) -> bool:
        """A chunk from `take` is read or has failed; True if the caller is to conclude the read."""
        with self._lock:
            read.in_flight -= 1
            if error is None:
                read.landed(chunk)
            if read.guessed_in_flight:
                self._guess_ended(read, 1)
            if error is not None:
                self._abandon(read, error)
            if read.queued or read.in_flight or read.claimed:
                return False
            read.claimed = True
            return True

    def read_again(self, read: Read) -> bool:
        """Put a concluded read back at the front, whole; False if the queue was closed meanwhile."""
        with self._lock:
            if self._closed_because is not None:
                read.error = self._closed_error(read)
                return False
            read.begin_again()
            read.claimed = False
            self._enqueue(read, first=True)
            return True

    def settle(self, read: Read) -> bool:
        """Take a read off the books; True the first time."""
        with self._lock:
            if read not in self._unsettled:
                return False
            self._unsettled.remove(read)
            read.into = read.source = read.on_landed = read.watcher = None
            return True

    def cancel(self, read: Read) -> bool:
        """See `Read.cancel`."""
        with self._lock:
            if read.speculative and read in self._unsettled and not read.claimed and read.error is None:
                self._give_up(read, ReadCancelledError(f"{read.name}: the prefetch was cancelled"))
            return isinstance(read.error, ReadCancelledError)

    def promote(self, read: Read) -> bool:
        """See `Read.promote`."""
        with self._lock:
            if read.error is not None:
                return False
            self._guess_ended(read, read.guessed_in_flight)
            if read.speculative and read.queued:
                self._speculation.remove(read)
                read.speculative = False
                self._enqueue(read)
            read.speculative = False
            return True

    def close(self, because: str) -> None:
        """Give up every read, and let threads go when those are concluded."""
        with self._lock:
            self._closed_because = because
            for read in self._unsettled:
                if not read.claimed:
                    self._give_up(read, self._closed_error(read))
            self._work.notify_all()

    def unsettled(self) -> list[Read]:
        """The reads that nobody has concluded yet."""
        with self._lock:
            return list(self._unsettled)

    def _enqueue(self, read: Read, first: bool = False) -> None:
        queue = self._speculation if read.speculative else self._demand
        if first:
            queue.appendleft(read)
        else:
            queue.append(read)
        read.queued = True
        self._work.notify(len(read.order))

    def _next_chunk(self, queue: deque[Read]) -> tuple[Read, range]:
        read = queue[0]
        chunk = read.order[read.next_chunk]
        read.next_chunk += 1
        read.next_bytes += len(chunk)
        read.in_flight += 1
        if read.speculative:
            read.guessed_in_flight += 1
            self._num_guessed_chunks += 1
        if read.next_chunk == len(read.order):
            queue.popleft()
            read.queued = False
        return read, chunk

    def _guess_ended(self, read: Read, num_chunks: int) -> None:
        """So many of its chunks count as speculation no more: other guesses may be read."""
        read.guessed_in_flight -= num_chunks
        self._num_guessed_chunks -= num_chunks
        self._work.notify(num_chunks)

    def _abandon(self, read: Read, error: MoeOffloadError) -> None:
        """Hand out no more chunks; the first error stays."""
        if read.error is None:
            read.error = error
        if read.queued:
            (self._speculation if read.speculative else self._demand).remove(read)
            read.queued = False

    def _give_up(self, read: Read, error: MoeOffloadError) -> None:
        self._abandon(read, error)
        if not read.in_flight:
            read.claimed = True
            self._given_up.append(read)
            self._work.notify()

    def _closed_error(self, read: Read) -> ExpertReadError:
        return ExpertReadError(f"{read.name} is not there: {self._closed_because}")
