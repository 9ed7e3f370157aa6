"""Experts computed on a CUDA device: from the disk into page-locked memory, from there into slots in VRAM."""

import threading
import warnings
from collections.abc import Sequence
from logging import getLogger

import torch

from moe_offload.errors import ConfigError, ExpertCopyError
from moe_offload.offload.experts.weights import ExpertWeights, PartLayout
from moe_offload.offload.pack.manifest import PackManifest
from moe_offload.offload.planning.sizes import format_size
from moe_offload.offload.streaming.reader import ExpertReader, ReadObserver
from moe_offload.offload.streaming.slab import CudaHost
from moe_offload.offload.tiers.compute_tier import Done, Transfer
from moe_offload.offload.tiers.device_queue import DeviceQueue
from moe_offload.offload.tiers.device_slot import DeviceSlot
from moe_offload.offload.tiers.host_expert import HostExpert
from moe_offload.offload.tiers.host_tier import HostTier

_log = getLogger(__name__)


class CudaTier:
    """Slots in VRAM, equal ones in one piece, above a `HostTier`. No thread waits for the device before `close`.

    A transfer counts as done when its copy is enqueued: kernels launched after `use` run behind it all the same.
    """

    def __init__(
        self,
        manifest: PackManifest,
        reader: ExpertReader,
        queue: DeviceQueue,
        *,
        num_slots: Sequence[int],
        num_staging_slots: int,
        num_host_slots: Sequence[int],
        num_host_staging_slots: int,
        cuda_host: CudaHost | None = None,
    ) -> None:
        """Reserve all memory. Warns where host memory cannot be page-locked. `close` closes reader and queue too."""
        self.num_staging_slots = num_staging_slots
        self._queue = queue
        self._slot_bytes = [layer.slot_bytes for layer in manifest.layers]
        self._layouts = [PartLayout(layer.parts) for layer in manifest.layers]
        # Of each layer, then of staging. `close`, perhaps called under a running step, replaces all of it at once.
        self._slots = _allocate_slots(queue, num_slots, self._slot_bytes)
        self._slots += _allocate_slots(queue, [num_staging_slots], [max(self._slot_bytes)])
        self._weights: dict[tuple[int, int], ExpertWeights] = {}
        self._lock = threading.Lock()
        self._bytes_copied = 0
        self._host = HostTier(
            manifest,
            reader,
            queue,
            num_slots=num_host_slots,
            num_staging_slots=num_host_staging_slots,
            cuda_host=cuda_host,
        )
        if self._host.pageable_bytes:
            queue.forget_error()
            warnings.warn(
                f"{format_size(self._host.pageable_bytes)} of {format_size(self._host.size_bytes)} of host memory for "
                f"experts are not page-locked, so copies from there are slower and hold up the thread that starts "
                f"them: {self._host.pin_failure}",
                UserWarning,
                stacklevel=2,
            )

    def begin(self, layer_idx: int, expert_idx: int, slot: int, *, speculative: bool, done: Done) -> Transfer:
        """Fetch the expert into host memory, if it is not there, then copy it into the slot."""
        target = self._slot(layer_idx, slot)

        def landed(expert: HostExpert) -> None:
            error: BaseException | None = None
            try:
                target.fill(expert)
                with self._lock:
                    self._bytes_copied += expert.data.numel()
            except Exception as failure:
                error = _typed(failure, layer_idx, expert_idx)
            done(error)

        # What only passes through, or is but a guess, is not to displace what the host tier has found worth keeping.
        keep = slot >= 0 and not speculative
        return self._host.fetch(layer_idx, expert_idx, speculative=speculative, keep=keep, landed=landed, failed=done)

    def exchanges(self, layer_idx: int) -> bool:
        """No: copies and kernels are ordered slot by slot."""
        return False

    def exchange(self, layer_idx: int, slot: int, staging_slot: int) -> None:
        """Not offered."""
        raise NotImplementedError

    def expert_bytes(self, layer_idx: int) -> int:
        """The size of an expert of this layer."""
        return self._slot_bytes[layer_idx]

    def use(self, layer_idx: int, slot: int) -> ExpertWeights:
        """Views of the slot, made once; this thread's stream waits for the copy, the thread does not."""
        self._slot(layer_idx, slot).use()
        weights = self._weights.get((layer_idx, slot))
        if weights is None:
            weights = ExpertWeights(self._layouts[layer_idx], self._slot(layer_idx, slot).data)
            self._weights[layer_idx, slot] = weights
        return weights

    def used(self, layer_idx: int, slot: int) -> None:
        """The next copy into the slot runs behind what this thread has launched."""
        self._slot(layer_idx, slot).used()

    def _slot(self, layer_idx: int, slot: int) -> DeviceSlot:
        slots = self._slots
        if not slots:
            raise ConfigError("the memory of the experts was freed: the model is closed; load it again")
        return slots[layer_idx][slot] if slot >= 0 else slots[-1][-1 - slot]

    def observe_reads(self, observer: ReadObserver | None) -> None:
        """The host tier's."""
        self._host.observe_reads(observer)

    @property
    def bytes_read(self) -> int:
        """Bytes that came from the disk."""
        return self._host.bytes_read

    @property
    def bytes_cancelled(self) -> int:
        """Those of them that belong to reads given up halfway."""
        return self._host.bytes_cancelled

    @property
    def bytes_copied(self) -> int:
        """Bytes that were sent to the device."""
        return self._bytes_copied

    @property
    def host(self) -> HostTier:
        """The tier below."""
        return self._host

    def close(self) -> None:
        """Fail what is being read, wait for copies and kernels, then free the memory. May be called twice."""
        self._host.stop()
        try:
            self._queue.close()
            for slot in [slot for slots in self._slots for slot in slots]:
                slot.wait_until_unused()
        except ExpertCopyError:
            _log.exception("the device has failed; its memory is let go of all the same")
        self._host.free()
        self._weights.clear()
        self._slots = []


def _allocate_slots(queue: DeviceQueue, num_slots: Sequence[int], slot_bytes: Sequence[int]) -> list[list[DeviceSlot]]:
    """Slots by layer; those of one size are one piece of memory."""
    slots: list[list[DeviceSlot]] = [[] for _ in num_slots]
    for size_bytes in sorted(set(slot_bytes)):
        layers = [layer_idx for layer_idx, size in enumerate(slot_bytes) if size == size_bytes]
        memory = queue.allocate(size_bytes * sum(num_slots[layer_idx] for layer_idx in layers))
        pieces = iter(torch.split(memory, size_bytes))
        for layer_idx in layers:
            slots[layer_idx] = [DeviceSlot(queue, next(pieces)) for _ in range(num_slots[layer_idx])]
    return slots


def _typed(error: Exception, layer_idx: int, expert_idx: int) -> ExpertCopyError:
    return ExpertCopyError(f"expert {expert_idx} of layer {layer_idx} could not be copied to the device: {error}")
