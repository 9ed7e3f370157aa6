"""Experts from disk into slots: a few threads, demand before speculation, every byte checked before it counts."""

import errno
import threading
import time
from collections.abc import Sequence
from logging import getLogger
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, get_args

import numpy as np

from moe_offload.errors import ConfigError, ExpertReadError, MoeOffloadError, PackCorruptError
from moe_offload.offload.pack.manifest import REPACK, SLOT_ALIGNMENT_BYTES, PackManifest
from moe_offload.offload.streaming.disk import DirectDisk, Disk
from moe_offload.offload.streaming.open_files import OpenFiles
from moe_offload.offload.streaming.read_queue import OnDone, Read, ReadCancelledError, ReadQueue, ReadWatcher, cut
from moe_offload.offload.streaming.reader_stats import ReaderCounters, ReaderStats
from moe_offload.offload.streaming.running_checksum import RunningChecksum

__all__ = ["ExpertReader", "Read", "ReadCancelledError", "ReadObserver", "ReadWatcher", "ReaderStats", "Verify"]

Verify = Literal["first", "always", "off"]
MAX_TRIES = 3
# Before the second and third try: a bus reset or a network disk that reconnects takes about this long.
BACKOFF_S = (0.01, 0.1)
CLOSE_TIMEOUT_S = 5.0
_log = getLogger(__name__)


class ReadObserver(Protocol):
    """Told of reads by the reader's threads: to be quick, and not to raise."""

    def settled(self, read: Read) -> None:
        """The read is whole, failed or cancelled; ``begin_ns`` (of ``perf_counter_ns``) is 0 if it never began."""


class ExpertReader:
    """Reads experts of one pack into memory that is the reader's until a read is done. Threads run until `close`."""

    def __init__(
        self,
        manifest: PackManifest,
        folder: str | PathLike[str],
        *,
        disk: Disk | None = None,
        num_threads: int = 4,
        chunk_bytes: int = 4 << 20,
        verify: Verify = "first",
    ) -> None:
        """Start the threads. ``verify``: check an expert's checksum on its first read, on every one, or never."""
        if verify not in get_args(Verify):
            raise ConfigError(f"verify is {verify!r}; it is one of {', '.join(get_args(Verify))}")
        if num_threads < 1 or chunk_bytes < 1 or chunk_bytes % SLOT_ALIGNMENT_BYTES:
            raise ConfigError(
                f"{num_threads} threads with chunks of {chunk_bytes} bytes: use multiples of 1 and of 4096"
            )
        self._layers = manifest.layers
        self._folder = Path(folder)
        self._files = OpenFiles(disk or DirectDisk(), self._folder)
        self._verify = verify
        self._verified = [bytearray(layer.num_experts) for layer in manifest.layers]
        self._queue = ReadQueue()
        self.chunk_bytes = chunk_bytes
        self._orders: dict[int, tuple[range, ...]] = {}  # by the size of an expert
        self._closing = threading.Event()
        self._counters = ReaderCounters()
        self.observer: ReadObserver | None = None
        self._threads = [
            threading.Thread(target=self._run, name=f"expert-reader-{i}", daemon=True) for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        layer_idx: int,
        expert_idx: int,
        into: memoryview,
        *,
        speculative: bool = False,
        on_done: OnDone | None = None,
        source: memoryview | None = None,
        order: Sequence[range] | None = None,
    ) -> Read:
        """Begin to read an expert into ``into``, writable bytes of its layer's ``slot_bytes``; returns at once.

        ``on_done`` gets None or the error, once, on a reader's thread, after verification and before waiters wake;
        it is to be quick and not to raise. Until then the memory is the reader's. Reads go straight to the disk if
        the memory is page-aligned. ``source``: memory that has the expert, to copy from in place of the disk; it was
        verified when it was read, and counts as no read. ``order``: the slot cut into chunks, as they are to be read;
        from its beginning if not given. Raises ExpertReadError when the reader is closed.
        """
        if not (0 <= layer_idx < len(self._layers) and 0 <= expert_idx < self._layers[layer_idx].num_experts):
            raise IndexError(f"the pack has no expert {expert_idx} of layer {layer_idx}")
        layer = self._layers[layer_idx]
        if into.readonly or not into.c_contiguous or into.nbytes != layer.slot_bytes:
            raise ValueError(f"expert {expert_idx} of layer {layer_idx} needs {layer.slot_bytes} writable bytes")
        read = Read(
            self._queue,
            (layer_idx, expert_idx),
            layer.experts[expert_idx],
            into.cast("B"),
            speculative,
            on_done,
            source,
            order or self._from_the_beginning(into.nbytes),
        )
        if source is None and self._must_verify(read):
            read.checksum = RunningChecksum()
        self._queue.add(read)
        return read

    def _from_the_beginning(self, size_bytes: int) -> Sequence[range]:
        order = self._orders.get(size_bytes)
        if order is None:
            order = self._orders[size_bytes] = cut(size_bytes, self.chunk_bytes)
        return order

    @property
    def stats(self) -> ReaderStats:
        """Totals so far."""
        return self._counters.snapshot()

    def close(self) -> None:
        """Fail what is outstanding, end the threads, close the files.

        Waits for chunks in flight, but not for ever: on a disk that does not answer it fails their reads after some
        seconds, on this thread, and their memory stays in use. May be called twice.
        """
        self._closing.set()
        self._queue.close(f"the reader of {self._folder} was closed")
        give_up_s = time.monotonic() + CLOSE_TIMEOUT_S
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, give_up_s - time.monotonic()))
        for read in self._queue.unsettled():
            self._settle(read)
        self._files.close()

    def __enter__(self) -> "ExpertReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        while (taken := self._queue.take()) is not None:
            read, span = taken
            problem: MoeOffloadError | None = None
            if span is not None:
                if self.observer is not None and not read.begin_ns:
                    read.begin_ns = time.perf_counter_ns()
                try:
                    problem = self._read_chunk(read, span)
                    if problem is None:
                        _tell_of(read, span)
                except BaseException as error:  # whatever it is, this thread lives on and the waiter is told
                    problem = self._typed(read, error)
            if span is None or self._queue.chunk_ended(read, span, problem):
                try:
                    self._conclude(read)
                except BaseException as error:
                    read.error = self._typed(read, error)
                    self._settle(read)
            elif (on_landed := read.on_landed) is not None:
                on_landed()
            del taken, read  # a thread that waits holds no slot

    def _read_chunk(self, read: Read, span: range) -> MoeOffloadError | None:
        """Read one chunk, trying again what may pass. Errors are returned: raised, they would hold on to the slot."""
        assert read.into is not None
        memory = read.into
        into = memory[span.start : span.stop]
        if read.source is not None:
            # numpy lets other threads run meanwhile, and starts none of its own.
            np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(read.source[span.start : span.stop], np.uint8))
            return None
        problem: BaseException | None = None
        for attempt in range(MAX_TRIES):
            if attempt:
                self._counters.add(retries=1)
                if self._closing.wait(BACKOFF_S[attempt - 1]):
                    break
            try:
                with self._counters.reading(), self._files.borrow(read.spec.file) as file:
                    done_bytes = 0
                    while done_bytes < len(into):
                        count = file.pread_into(into[done_bytes:], read.spec.offset_bytes + span.start + done_bytes)
                        if count == 0:
                            raise EOFError
                        done_bytes += count
                self._counters.add(bytes_read=len(into))
                if read.checksum is not None:
                    read.checksum.landed(memory, span)
                return None
            except (OSError, EOFError) as error:
                problem = error.with_traceback(None)
                if isinstance(error, FileNotFoundError):
                    break
        return self._typed(read, problem)

    def _typed(self, read: Read, problem: BaseException | None) -> MoeOffloadError:
        path = self._folder / read.spec.file
        if isinstance(problem, FileNotFoundError):
            return PackCorruptError(f"{path} with {read.name} is missing; {REPACK}")
        if isinstance(problem, EOFError):
            end_bytes = read.spec.offset_bytes + read.size_bytes
            return PackCorruptError(f"{path} ends before {read.name}, which lies up to byte {end_bytes}; {REPACK}")
        hint = "check the disk (dmesg, smartctl)"
        if isinstance(problem, OSError):
            if problem.errno == errno.EMFILE:
                hint = "raise the limit on open files (ulimit -n)"
            reason = problem.strerror or str(problem)
        else:
            reason = repr(problem)
        return ExpertReadError(
            f"{read.name} could not be read from {path} at byte {read.spec.offset_bytes}, "
            f"tried up to {MAX_TRIES} times: {reason}; {hint}"
        )

    def _conclude(self, read: Read) -> None:
        """Verify a read whose bytes are all there, or that failed, and settle it."""
        if read.error is None and read.checksum is not None:
            found = read.checksum.hexdigest()
            if found == read.spec.checksum:
                self._verified[read.layer_idx][read.expert_idx] = True
                self._counters.add(verified=1)
            elif not read.rereads:
                self._counters.add(retries=1)
                if read.watcher is not None:
                    read.watcher.begins_again()
                if self._queue.read_again(read):
                    return
            else:
                read.error = PackCorruptError(
                    f"{read.name} in {self._folder / read.spec.file} at byte {read.spec.offset_bytes} is damaged: its "
                    f"checksum is {found}, not {read.spec.checksum}; {REPACK}"
                )
        self._settle(read)

    def _must_verify(self, read: Read) -> bool:
        if self._verify == "first":
            return not self._verified[read.layer_idx][read.expert_idx]
        return self._verify == "always"

    def _settle(self, read: Read) -> None:
        """Tell whoever waits, once."""
        if not self._queue.settle(read):
            return
        if read.from_memory:
            self._call_back(read)
            return
        if read.error is None:
            self._counters.add(reads=1)
        elif isinstance(read.error, ReadCancelledError):
            self._counters.add(cancelled=1, bytes_cancelled=read.next_bytes)
        else:
            self._counters.add(failed=1)
        if (observer := self.observer) is not None:
            observer.settled(read)
        self._call_back(read)

    def _call_back(self, read: Read) -> None:
        try:
            if read.on_done is not None:
                read.on_done(read.error)
        except BaseException:
            _log.exception("the callback of %s failed", read.name)
        finally:
            read.settled.set()


def _tell_of(read: Read, chunk: range) -> None:
    """Here, so that a thread that waits for work holds nobody who watched."""
    if (watcher := read.watcher) is not None:
        watcher.chunk_landed(chunk)
