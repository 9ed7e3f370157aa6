"""Recording on a CUDA device: one CUDA graph a piece, all in one memory pool."""

import contextlib
import gc
from collections.abc import Iterator

import torch

from moe_offload.offload.graphs.recorder import RecordingError, Replay


class CudaRecorder:
    """See `Recorder`. Everything that is recorded with one object shares a pool: at most one session at a time."""

    def __init__(self, device: torch.device) -> None:
        """``device``: "cuda:N"."""
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._graph: torch.cuda.CUDAGraph | None = None

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """On a stream of its own, which the pieces are not bound to: they are replayed on any."""
        gc.collect()  # what is thrown away during a capture may do what a capture forbids
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        except RuntimeError as error:  # torch's: "operation not permitted when stream is capturing", and its kin
            raise RecordingError(str(error).splitlines()[0]) from error
        finally:
            if self._graph is not None:  # ended in the middle of a piece
                with contextlib.suppress(RuntimeError), torch.cuda.stream(self._stream):
                    self._graph.capture_end()
                self._graph = None
            current.wait_stream(self._stream)

    def begin(self) -> None:
        """Other threads go on copying and allocating: only this thread's mistakes end the capture."""
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self._graph = graph

    def end(self) -> Replay:
        """The graph, ready to be launched on the current stream of whoever replays it."""
        graph = self._graph
        assert graph is not None, "a piece was begun"
        self._graph = None
        graph.capture_end()
        return graph.replay
