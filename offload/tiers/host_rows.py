"""A few rows on their way between a device and the host, in page-locked buffers that every layer uses again."""

import contextlib
import mmap
from collections.abc import Hashable

import torch

from moe_offload.errors import ExpertCopyError
from moe_offload.offload.streaming.slab import Slab
from moe_offload.offload.tiers.device_queue import DeviceQueue, Event

_ALIGNMENT = 64


class HostRows:
    """The rows of one step at one layer.

    `fetch` once a step, before anything is launched that the CPU is to work beside: what follows it on the stream does
    not delay it. Then `rows` waits for them, and `outputs` and `send` go by turns. Everything is on the stream of the
    thread that runs the step; another stream's step begins when the last one's rows are over.
    """

    def __init__(self, queue: DeviceQueue) -> None:
        self._queue = queue
        self._slab: Slab | None = None
        self._fetched: Event = queue.new_event()
        self._sent: Event = queue.new_event()
        self._stream: Hashable = None
        self._x: torch.Tensor | None = None
        self._index: torch.Tensor | None = None
        self._outputs = torch.empty(0)
        self._next_row = 0

    def fetch(self, x: torch.Tensor, top_k_index: torch.Tensor) -> None:
        """Start to bring ``x [T, H]`` and the router's choice ``[T, K]``."""
        if self._stream != (stream := self._queue.stream()):
            self._wait()
            self._stream = stream
        num_pairs, hidden = top_k_index.numel(), x.shape[1]
        sizes = [_aligned(tensor.numel() * tensor.element_size()) for tensor in (x, top_k_index)]
        memory = self._memory(sum(sizes) + num_pairs * hidden * 4)
        here, index, outputs = torch.split(memory, [*sizes, memory.numel() - sum(sizes)])
        self._x, self._index = _like(here, x), _like(index, top_k_index)
        self._outputs = outputs[: num_pairs * hidden * 4].view(torch.float32).view(num_pairs, hidden)
        self._next_row = 0
        self._queue.to_host(x, self._x, event=self._fetched)
        self._queue.to_host(top_k_index, self._index, event=self._fetched)

    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What was fetched, when it is there; the same bytes until the next step."""
        assert self._x is not None, "fetch comes first"
        assert self._index is not None
        self._fetched.wait()
        return self._x, self._index

    def outputs(self, num_rows: int) -> torch.Tensor:
        """Room for so many more of the step's outputs, fp32 ``[n, H]``; at most one for each pair."""
        if not self._next_row:
            self._sent.wait()  # an earlier step's, in the same memory: it was over before this step's rows came
        begin, self._next_row = self._next_row, self._next_row + num_rows
        return self._outputs[begin : self._next_row]

    def send(self, outputs: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The same on the device, for what this thread launches from now on."""
        there = torch.empty_like(outputs, device=device)
        self._queue.to_device(outputs, there, event=self._sent)
        return there

    def _memory(self, size_bytes: int) -> torch.Tensor:
        if self._slab is None or self._slab.size_bytes < size_bytes:
            self.close()
            self._slab = Slab(1, -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE, page_lock=self._queue.page_lock)
        return self._slab.tensor(0)

    def close(self) -> None:
        """Wait for what is under way, and free the memory."""
        slab, self._slab = self._slab, None
        if slab is not None:
            with contextlib.suppress(ExpertCopyError):  # a device that has failed moves nothing any more
                self._wait()
            slab.close()

    def _wait(self) -> None:
        self._fetched.wait()
        self._sent.wait()


class RowsPool:
    """Those of one device, as many as there are steps at a time. Any thread may call any method."""

    def __init__(self, queue: DeviceQueue) -> None:
        self._queue = queue
        self._free: list[HostRows] = []
        self._made: list[HostRows] = []

    def take(self) -> HostRows:
        """Some for a step, which gives them back."""
        try:
            return self._free.pop()
        except IndexError:
            rows = HostRows(self._queue)
            self._made.append(rows)
            return rows

    def give_back(self, rows: HostRows) -> None:
        """The step is through; what it has sent may still be under way."""
        self._free.append(rows)

    def close(self) -> None:
        """Free the memory of all; no step runs any more."""
        while self._made:
            self._made.pop().close()


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT) * _ALIGNMENT


def _like(memory: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return memory[: tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
