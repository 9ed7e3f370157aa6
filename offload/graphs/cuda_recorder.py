"""Recording on a CUDA device: one CUDA graph a piece, all in one memory pool."""

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch

from moe_offload.offload.graphs.recorder import RecordingError, Replay


class CudaRecorder:
    """See `Recorder`. Everything that is recorded with one object shares a pool: at most one session at a time."""

    def __init__(self, device: torch.device) -> None:
        """``device``: "cuda:N"."""
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool: Any = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._keeper: torch.cuda.CUDAGraph | None = None
        self._failed: list[torch.cuda.CUDAGraph] = []
        self._mark = torch.zeros(1, device=device)

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """On a stream of its own, which the pieces are not bound to: they are replayed on any."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with _uncollected(), torch.cuda.stream(self._stream):
                self._open_pool()
                yield
        except RuntimeError as error:  # torch's: "operation not permitted when stream is capturing", and its kin
            raise RecordingError(str(error).splitlines()[0]) from error
        finally:
            if self._graph is not None:
                self._give_up(self._graph)
            current.wait_stream(self._stream)

    def begin(self) -> None:
        """Other threads go on copying and allocating: only this thread's mistakes end the capture."""
        self._graph = torch.cuda.CUDAGraph()
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> Replay:
        """The graph, ready to be launched on the current stream of whoever replays it."""
        graph = self._graph
        assert graph is not None, "a piece was begun"
        graph.capture_end()
        self._graph = None
        return graph.replay

    def _open_pool(self) -> None:
        """A pool whose last graph is gone cannot be captured into again: one graph stays for as long as the pool."""
        if self._pool is not None:
            return
        self._mark.zero_()
        self._pool = torch.cuda.graph_pool_handle()
        self.begin()
        self._mark.zero_()
        self._keeper = self._graph
        self.end()

    def _give_up(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture in the middle of its piece: after a mistake, or Ctrl-C at any place."""
        self._graph = None
        with torch.cuda.stream(self._stream):
            if not torch.cuda.is_current_stream_capturing():
                return
            try:
                graph.capture_end()
            except RuntimeError:
                # torch does not get to telling its allocators, which go on filling the pool, and ask the graph which
                # allocations are its own: end that, let the graph live, and use another pool from now on.
                device_idx = self._stream.device.index
                torch._C._cuda_endAllocateToPool(device_idx, self._pool)
                torch._C._cuda_releasePool(device_idx, self._pool)
                self._failed.append(graph)
                self._pool = self._keeper = None


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage is collected on this thread meanwhile: freeing it may do what a capture forbids."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
