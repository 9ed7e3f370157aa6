"""A reader made up for tests: reads go on one piece at a time, when and in the order that `step` draws."""

import random
from collections.abc import Callable, Mapping
from types import SimpleNamespace

import torch
from fake_device import RUBBISH, FakeDevice

from moe_offload.errors import ExpertReadError
from moe_offload.offload.streaming.reader import ReadCancelledError, ReadWatcher

OnDone = Callable[[BaseException | None], None]


class FakeRead:
    def __init__(
        self,
        key: tuple[int, int],
        into: torch.Tensor,
        speculative: bool,
        on_done: OnDone,
        source: torch.Tensor | None = None,
    ) -> None:
        self.key, self.into, self.speculative, self.on_done, self.source = key, into, speculative, on_done, source
        self.cancelled = False
        self.pieces_left = 2
        self.watcher: ReadWatcher | None = None
        self.rereads = 0
        self.is_damaged = False

    def cancel(self) -> bool:
        if self.speculative and self.pieces_left:
            self.cancelled = True
        return self.cancelled

    def promote(self) -> bool:
        self.speculative = False
        return not self.cancelled


class FakeReader:
    """Reads ``blobs[layer_idx, expert_idx]``. Stands in for an `ExpertReader`.

    A share of the reads fails, and a share brings wrong bytes at the first try, which its end finds out.
    """

    def __init__(
        self,
        blobs: Mapping[tuple[int, int], bytes],
        device: FakeDevice,
        seed: int = 0,
        failing: float = 0.0,
        damaged: float = 0.0,
    ) -> None:
        self.blobs, self.device, self.failing, self.damaged = blobs, device, failing, damaged
        self.random = random.Random(seed)
        self.reads: list[FakeRead] = []
        self.log: list[tuple[int, int, bool]] = []
        self.from_memory: list[tuple[int, int, bool]] = []
        self.bytes_read = 0
        self.chunk_bytes = 1 << 22
        self.closed = False

    def submit(
        self,
        layer_idx: int,
        expert_idx: int,
        into: memoryview,
        *,
        speculative: bool = False,
        on_done: OnDone | None = None,
        source: memoryview | None = None,
    ) -> FakeRead:
        if self.closed:
            raise ExpertReadError("closed")
        assert on_done is not None
        assert into.nbytes == len(self.blobs[layer_idx, expert_idx])
        data = torch.frombuffer(into, dtype=torch.uint8)
        memory = None if source is None else torch.frombuffer(source, dtype=torch.uint8)
        read = FakeRead((layer_idx, expert_idx), data, speculative, on_done, memory)
        read.is_damaged = source is None and self.damaged > 0 and self.random.random() < self.damaged
        self.reads.append(read)
        (self.log if source is None else self.from_memory).append((layer_idx, expert_idx, speculative))
        return read

    @property
    def stats(self) -> SimpleNamespace:
        return SimpleNamespace(bytes_read=self.bytes_read)

    def step(self) -> bool:
        """One piece of one read, or its end; False if nothing is being read."""
        if not self.reads:
            return False
        read = self.random.choice(self.reads)
        if read.cancelled:
            self._end(read, ReadCancelledError("cancelled"))
        elif read.pieces_left:
            half = read.into.numel() // 2
            chunk = range(half, read.into.numel()) if read.pieces_left == 2 else range(half)
            into = read.into[chunk.start : chunk.stop]
            self.device.disk_writes(into)
            blob = torch.frombuffer(bytearray(self.blobs[read.key]), dtype=torch.uint8)
            if read.source is not None:
                blob = read.source  # as it is now: if it is wrong, so is what comes of it
            into.copy_(blob[chunk.start : chunk.stop])
            if read.is_damaged:
                into.fill_(RUBBISH)
            read.pieces_left -= 1
            if read.watcher is not None:
                read.watcher.chunk_landed(chunk)
        elif read.is_damaged:
            if read.watcher is not None:
                read.watcher.begins_again()
            read.is_damaged, read.pieces_left, read.rereads = False, 2, 1
        elif self.random.random() < self.failing:
            self._end(read, ExpertReadError(f"expert {read.key[1]} of layer {read.key[0]} could not be read"))
        else:
            self.bytes_read += read.into.numel() if read.source is None else 0
            self._end(read, None)
        return True

    def finish(self) -> None:
        """Until nothing is being read."""
        while self.step():
            pass

    def close(self) -> None:
        self.closed = True
        while self.reads:
            self._end(self.reads[0], ExpertReadError("the reader was closed"))

    def _end(self, read: FakeRead, error: BaseException | None) -> None:
        self.reads.remove(read)
        read.on_done(error)
