"""Experts computed on CUDA devices: from the disk into page-locked memory, from there into slots in VRAM."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from logging import getLogger

import torch

from moe_offload.errors import ExpertCopyError
from moe_offload.offload.experts.weights import ExpertWeights, PartLayout
from moe_offload.offload.pack.manifest import PackManifest
from moe_offload.offload.planning.sizes import format_size
from moe_offload.offload.streaming.reader import ExpertReader, ReadObserver
from moe_offload.offload.tiers.compute_tier import Done, Transfer
from moe_offload.offload.tiers.device_queue import DeviceQueue
from moe_offload.offload.tiers.device_slot import DeviceSlot
from moe_offload.offload.tiers.device_slots import DeviceSlots
from moe_offload.offload.tiers.host_expert import HostExpert
from moe_offload.offload.tiers.host_rows import RowsPool
from moe_offload.offload.tiers.host_tier import HostTier
from moe_offload.offload.tiers.lender import LentExpert
from moe_offload.offload.tiers.link_meter import CopyObserver, LinkTotals
from moe_offload.offload.tiers.slot_copy import CopySchedule, SlotCopy
from moe_offload.offload.tiers.slot_order import TierSlotOrder

_log = getLogger(__name__)


class CudaTier:
    """Slots in VRAM above a `HostTier`, which all devices share. No thread waits for a device before `close`.

    Every layer is on one device and has a slab there; each device has a copy stream, and staging slots of all numbers.
    A transfer counts as done when its copy is enqueued: kernels launched after `use` run behind it all the same.
    """

    def __init__(
        self,
        manifest: PackManifest,
        reader: ExpertReader,
        queues: Sequence[DeviceQueue],
        *,
        device_of_layer: Sequence[int] | None = None,
        num_slots: Sequence[int],
        num_staging_slots: int,
        num_host_slots: Sequence[int],
        num_host_staging_slots: int,
    ) -> None:
        """Reserve all memory. Warns where host memory cannot be page-locked. `close` closes reader and queues too.

        ``device_of_layer``: for each layer an index of ``queues``; by default all are on the first.
        """
        self.num_staging_slots = num_staging_slots
        self.queues = tuple(queues)
        self._slot_bytes = [layer.slot_bytes for layer in manifest.layers]
        self._layouts = [PartLayout(layer.parts) for layer in manifest.layers]
        self._device_of_layer = [0] * len(num_slots) if device_of_layer is None else list(device_of_layer)
        staging_shape = (num_staging_slots, max(self._slot_bytes))
        self._devices = []
        for device, queue in enumerate(queues):
            layers = [layer_idx for layer_idx, on in enumerate(self._device_of_layer) if on == device]
            shapes = {layer_idx: (num_slots[layer_idx], self._slot_bytes[layer_idx]) for layer_idx in layers}
            self._devices.append(DeviceSlots(queue, shapes, staging_shape))
        self._copies = [CopySchedule(queue) for queue in queues]
        self._weights: dict[tuple[int, int], ExpertWeights] = {}
        self._rows = [RowsPool(queue) for queue in queues]
        self._lent_weights: dict[tuple[int, int], ExpertWeights] = {}  # by layer and address
        self._host = HostTier(
            manifest, reader, queues[0], num_slots=num_host_slots, num_staging_slots=num_host_staging_slots
        )
        if self._host.pageable_bytes:
            way = (
                "copies from there are slower, and hold up the thread that starts them"
                if self._host.pageable_staging
                else "they are copied by way of staging slots that are, which takes CPU time"
            )
            warnings.warn(
                f"{format_size(self._host.pageable_bytes)} of {format_size(self._host.size_bytes)} of host memory for "
                f"experts are not page-locked: {way}; {self._host.pin_failure}",
                UserWarning,
                stacklevel=2,
            )

    def begin(self, layer_idx: int, expert_idx: int, slot: int, *, speculative: bool, done: Done) -> Transfer:
        """Fetch the expert into host memory, if it is not there, then copy it into the slot."""
        copies = self._copies[self._device_of_layer[layer_idx]]
        key = (layer_idx, expert_idx)
        copy = SlotCopy(copies, key, self._slot(layer_idx, slot), speculative=speculative, done=done)
        # What only passes through, or is but a guess, is not to displace what the host tier has found worth keeping.
        keep = slot >= 0 and not speculative
        copy.fetch = self._host.fetch(
            *key,
            speculative=speculative,
            keep=keep,
            landed=lambda expert: copies.start(copy, expert),
            failed=done,
            flow=copy,
        )
        return copy

    def exchanges(self, layer_idx: int) -> bool:
        """No: copies and kernels are ordered slot by slot."""
        return False

    def exchange(self, layer_idx: int, slot: int, staging_slot: int) -> None:
        """Not offered."""
        raise NotImplementedError

    @property
    def lender(self) -> "CudaTier":
        """Itself."""
        return self

    def lends(self, layer_idx: int) -> bool:
        """Where the layer has host slots; what only passes through staging is on its way to the device."""
        return self._host.has_slots(layer_idx)

    def lend(
        self,
        layer_idx: int,
        expert_idx: int,
        *,
        lent: Callable[[LentExpert], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        """From its host slot, into which it is read first if it is not there."""
        over = self._queue(layer_idx).new_event()  # never recorded: the CPU is done with it when it gives it back

        def landed(expert: HostExpert) -> None:
            weights = self._host_weights(layer_idx, expert.data)
            lent(LentExpert(weights, partial(expert.hold_until, over)))

        self._host.fetch(
            layer_idx, expert_idx, speculative=False, keep=True, for_copy=False, landed=landed, failed=failed
        )

    def rows(self, layer_idx: int) -> RowsPool:
        """Those of the layer's device."""
        return self._rows[self._device_of_layer[layer_idx]]

    def copy_s_per_byte(self, layer_idx: int) -> float:
        """That of the layer's device."""
        return self._queue(layer_idx).copy_s_per_byte

    def _queue(self, layer_idx: int) -> DeviceQueue:
        return self.queues[self._device_of_layer[layer_idx]]

    def _host_weights(self, layer_idx: int, data: torch.Tensor) -> ExpertWeights:
        """Views of host memory, made once for each place in it."""
        key = (layer_idx, data.data_ptr())
        weights = self._lent_weights.get(key)
        if weights is None:
            weights = self._lent_weights[key] = ExpertWeights(self._layouts[layer_idx], data)
        return weights

    def expert_bytes(self, layer_idx: int) -> int:
        """The size of an expert of this layer."""
        return self._slot_bytes[layer_idx]

    def use(self, layer_idx: int, slot: int) -> ExpertWeights:
        """Views of the slot, made once; this thread's stream waits for the copy, the thread does not."""
        self._slot(layer_idx, slot).use()
        weights = self._weights.get((layer_idx, slot))
        if weights is None:
            # By (layer, slot) also for staging, whose slots take experts of any layer, on any device.
            place = self._slot(layer_idx, slot)
            weights = ExpertWeights(self._layouts[layer_idx], place.data, place.slab, place.row)
            self._weights[layer_idx, slot] = weights
        return weights

    def used(self, layer_idx: int, slot: int) -> None:
        """The next copy into the slot runs behind what this thread has launched."""
        self._slot(layer_idx, slot).used()

    def resize(self, layer_idx: int, num_slots: int, numbers: Mapping[int, int]) -> bool:
        """Gives the allocator a layer's slab for another one; see `DeviceSlots.resize`."""
        for key in [key for key in self._weights if key[0] == layer_idx and key[1] >= 0]:
            del self._weights[key]  # they hold on to the old slab
        return self._devices[self._device_of_layer[layer_idx]].resize(layer_idx, num_slots, numbers)

    def slab(self, layer_idx: int) -> torch.Tensor:
        """All slots of a layer, ``uint8 [rows, slot_bytes]``, for kernels that are told rows."""
        return self._devices[self._device_of_layer[layer_idx]].slab(layer_idx)

    def row(self, layer_idx: int, slot: int) -> int:
        """Where in the layer's slab a slot of the cache is."""
        return self._slot(layer_idx, slot).row

    def layout(self, layer_idx: int) -> PartLayout:
        """Where the parts of an expert of this layer lie in a slot."""
        return self._layouts[layer_idx]

    @property
    def num_devices(self) -> int:
        """How many devices have layers."""
        return len(self.queues)

    def slot_order(self) -> TierSlotOrder:
        """For steps on the first device that find their experts' slots by themselves."""
        return TierSlotOrder(self.queues[0], self._slot)

    def _slot(self, layer_idx: int, slot: int) -> DeviceSlot:
        return self._devices[self._device_of_layer[layer_idx]].slot(layer_idx, slot)

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
        """Bytes that were sent to the devices."""
        return self.link_totals.num_bytes

    @property
    def link_totals(self) -> LinkTotals:
        """Of all links together."""
        return sum((queue.link.totals() for queue in self.queues), LinkTotals())

    @property
    def link_peaks_bytes_per_s(self) -> list[float]:
        """Of each link; 0 where it is not known yet."""
        return [queue.link.peak_bytes_per_s for queue in self.queues]

    def observe_copies(self, observer: CopyObserver | None) -> None:
        """All devices'."""
        for number, queue in enumerate(self.queues):
            queue.link.observe(observer, number)

    @property
    def host(self) -> HostTier:
        """The tier below."""
        return self._host

    def close(self) -> None:
        """Fail what is being read, wait for copies and kernels, then free the memory. May be called twice."""
        self._host.stop()
        for copies in self._copies:
            copies.stop()
        for queue, slots in zip(self.queues, self._devices, strict=True):
            try:  # each for itself: where one device has failed, others may still be copying
                queue.close()
                for slot in slots:
                    slot.wait_until_unused()
            except ExpertCopyError:
                _log.exception("a device has failed; its memory is let go of all the same")
        for rows in self._rows:
            rows.close()
        self._host.free()
        self._weights.clear()
        self._lent_weights.clear()
        for slots in self._devices:
            slots.free()
