"""What a CUDA device's memory holds besides what a plan puts there: the context, the libraries, and what is lost.

CUDA context: 400 MiB, of the driver and of kernels as they are first used, which took 300 to 400 MiB since CUDA 11.7
(PyTorch issues 107667 and 109888). It is outside torch's allocator.

Library work: cuBLAS has a workspace for each pair of a thread's handle and a stream, 32 MiB from Hopper on and 8.1 MiB
before (``getChosenWorkspaceSize`` in ``aten/src/ATen/cuda/CublasHandlePool.cpp``). Two threads run a model: the one
that asks and the one that streams an answer.

Recorded steps: the private pool of CUDA graphs, from which nothing else can take (``torch.cuda.graph_pool_handle``):
the workspace of one token, a workspace of cuBLAS, and an open segment of either kind. Beside it, the recurrent states
as they were before a step that may be undone.

Fragmentation: the segments that the allocator takes for slabs, dense weights, keys and values, less what was asked
for (`caching_allocator`). Tensors of up to 1 MiB once more: transformers reserves one block for all weights
(``caching_allocator_warmup``), and small ones then lie elsewhere. For what comes and goes, an open segment of either
kind and a quarter of the workspace: passes of models, replayed through the allocator's rules under the smallest limit
that lets them pass, needed a fifth more than was alive at their peak, and open segments (`tests/test_cuda_memory.py`).
"""

from collections.abc import Iterable
from dataclasses import dataclass

from moe_offload.offload.planning.caching_allocator import (
    SHARED_SEGMENT_BYTES,
    SMALL_SEGMENT_BYTES,
    CachingAllocator,
)

_MIB = 1024**2
CONTEXT_BYTES = 400 * _MIB
_BLAS_WORKSPACE_BYTES = 32 * _MIB
LIBRARY_BYTES = 2 * _BLAS_WORKSPACE_BYTES
_OPEN_SEGMENTS_BYTES = SHARED_SEGMENT_BYTES + SMALL_SEGMENT_BYTES
_SPLIT_SHARE = 4  # one in so many bytes of the workspace


@dataclass(frozen=True)
class CudaOverhead:
    """Bytes of a device beside weights, cache, workspace and slots."""

    context_bytes: int
    library_bytes: int
    graph_pool_bytes: int
    fragmentation_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.context_bytes + self.library_bytes + self.graph_pool_bytes + self.fragmentation_bytes


def graph_pool_bytes(step_workspace_bytes: int, state_bytes: int) -> int:
    """The private pool of recorded steps, of which one takes ``step_workspace_bytes``, and the states kept beside."""
    return step_workspace_bytes + state_bytes + _BLAS_WORKSPACE_BYTES + _OPEN_SEGMENTS_BYTES


def fragmentation_bytes(
    slabs: Iterable[int], *, dense_bytes: int, small_dense_bytes: int, cache_layers: Iterable[int], workspace_bytes: int
) -> int:
    """What is lost between the tensors of a device, in bytes.

    ``slabs``: the bytes of each; ``small_dense_bytes``: of dense weights of up to 1 MiB each; ``cache_layers``: the
    bytes of each layer's keys and values, which are two tensors.
    """
    allocator, asked_bytes = CachingAllocator(), 0
    for size_bytes in [*slabs, dense_bytes, *(half for size in cache_layers for half in (size // 2, size - size // 2))]:
        if size_bytes:
            allocator.allocate(size_bytes)
            asked_bytes += size_bytes
    lost_bytes = allocator.reserved_bytes - asked_bytes
    return lost_bytes + small_dense_bytes + _OPEN_SEGMENTS_BYTES + workspace_bytes // _SPLIT_SHARE
