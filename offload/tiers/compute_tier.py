"""The memory that experts are computed from: slots that transfers fill and kernels read."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from moe_offload.offload.experts.weights import ExpertWeights, PartLayout
from moe_offload.offload.streaming.reader import ReadObserver
from moe_offload.offload.tiers.lender import Lender
from moe_offload.offload.tiers.link_meter import CopyObserver, LinkTotals

Done = Callable[[BaseException | None], None]


class Transfer(Protocol):
    """The bytes of one expert on their way to a slot."""

    def cancel(self) -> bool:
        """Give up a speculative transfer: ``done`` gets a `ReadCancelledError` soon. False if it is too late."""

    def promote(self) -> bool:
        """Somebody waits for it now: treat it as demand. False if it was cancelled before."""


class ComputeTier(Protocol):
    """Slots by layer. Slots from 0 are the cache's; negative ones (-1, -2, ...) are staging, shared by all layers."""

    @property
    def num_staging_slots(self) -> int:
        """How many staging slots there are."""

    def begin(self, layer_idx: int, expert_idx: int, slot: int, *, speculative: bool, done: Done) -> Transfer:
        """Start to fill a slot. ``done`` is called once, from any thread, with what went wrong or None.

        The caller sees to it that nothing that was launched before still reads the slot, except on this tier's own
        queue, where the transfer is ordered behind it.
        """

    def exchanges(self, layer_idx: int) -> bool:
        """Whether a staging slot can take the place of a slot of this layer."""

    def exchange(self, layer_idx: int, slot: int, staging_slot: int) -> None:
        """Let the two swap their memory, and with it what is in it or on its way there. Nobody reads either."""

    @property
    def lender(self) -> Lender | None:
        """What lends experts to the CPU; None where it computes all of them anyway."""

    def expert_bytes(self, layer_idx: int) -> int:
        """The size of an expert of this layer."""

    def layout(self, layer_idx: int) -> PartLayout:
        """Where the parts of an expert of this layer lie in a slot."""

    def slab(self, layer_idx: int) -> torch.Tensor | None:
        """The layer's slots on a device, ``uint8 [slots, slot_bytes]``; None where the CPU computes."""

    def resize(self, layer_idx: int, num_slots: int, numbers: Mapping[int, int]) -> bool:
        """Let the layer have so many slots, experts moving to new ``numbers``; False if their bytes are lost.

        Nobody reads or fills the layer's slots meanwhile. Raises BudgetError where there is no memory for them.
        """

    def use(self, layer_idx: int, slot: int) -> ExpertWeights:
        """The expert in a slot whose transfer is done; kernels launched from now on see its bytes."""

    def used(self, layer_idx: int, slot: int) -> None:
        """The kernels that read the slot are launched; a later transfer into it is ordered behind them."""

    def observe_reads(self, observer: ReadObserver | None) -> None:
        """Tell ``observer`` of every read from the disk; None: nobody."""

    @property
    def bytes_read(self) -> int:
        """Bytes that came from the disk."""

    @property
    def bytes_cancelled(self) -> int:
        """Those of them that belong to reads given up halfway."""

    @property
    def bytes_copied(self) -> int:
        """Bytes that were copied to a device of its own; none where the disk is read into the slots themselves."""

    @property
    def link_totals(self) -> LinkTotals:
        """What the links to the devices have carried, and for how long they were busy."""

    @property
    def link_peaks_bytes_per_s(self) -> Sequence[float]:
        """The fastest that each link was seen to be; 0 while that is not known. Empty where there is none."""

    def observe_copies(self, observer: CopyObserver | None) -> None:
        """Tell ``observer`` of every copy to a device; None: nobody."""

    def close(self) -> None:
        """Stop transfers and free the memory."""
