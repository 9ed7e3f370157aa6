"""A layer's experts as kernels compute them that are told slots: a decode step's, and the rows of a prompt."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from moe_offload.offload.experts.weights import ExpertWeights
from moe_offload.quant.slot_kernels import SlotKernels, SlotMlp

Batch = Sequence[tuple[int, ExpertWeights]]
"""Experts that are there, each with where it is."""
ABSENT = -1
MOST_STEP_ROWS = 8
"""So many rows go through `SlotStep`; more are worth a product by expert."""


@dataclass(frozen=True)
class SlotExperts:
    """What the experts of one layer are, and the kernels for them."""

    mlp: SlotMlp
    kernels: SlotKernels
    slab: torch.Tensor
    """The layer's slots of the cache, ``uint8 [slots, slot_bytes]``."""

    def compute(self, x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
        """``out [T, H]`` from ``x [T, H]``, by slots ``int32 [T, K]`` of the slab and weights ``fp32 [T, K]``."""
        self.kernels.decode_layer(self.mlp, self.slab, slots, x, weights, out)


class SlotStep:
    """A few rows' way through the experts of a layer, some of them at a time as their weights arrive.

    The outputs are kept apart in fp32 until all are there; which experts were computed together changes no bit.
    """

    def __init__(
        self, experts: SlotExperts, x: torch.Tensor, expert_ids: Sequence[Sequence[int]], weights: torch.Tensor
    ) -> None:
        """``x [T, H]``; ``expert_ids [T, K]`` in router order, `ABSENT` for none; weights ``[T, K]`` on the device."""
        self._experts, self._x, self._ids = experts, x.contiguous(), expert_ids
        self._weights = weights.float().contiguous()
        self._missing = {expert_idx for row in expert_ids for expert_idx in row if expert_idx != ABSENT}
        self._outputs: torch.Tensor | None = None
        self.result = torch.empty_like(self._x)
        """``[T, H]`` in the dtype of x, once every expert was computed."""
        if not self._missing:
            self.result.zero_()

    @property
    def outputs(self) -> torch.Tensor:
        """``fp32 [T, K, H]``: where the experts' outputs are kept."""
        if self._outputs is None:
            shape = (*self._weights.shape, self._experts.mlp.output_size)
            self._outputs = torch.empty(shape, device=self._x.device)
        return self._outputs

    def compute(self, batch: Batch) -> None:
        """Some of the experts, each of which comes once."""
        kernels, mlp = self._experts.kernels, self._experts.mlp
        slabs = list(_by_slab(batch))
        self._missing -= {expert_idx for expert_idx, _ in batch}
        if self._outputs is None and not self._missing and len(slabs) == 1:  # all at once
            ((slab, rows),) = slabs
            kernels.decode_layer(mlp, slab, self._slots(rows), self._x, self._weights, self.result)
            return
        for slab, rows in slabs:
            kernels.decode_experts(mlp, slab, self._slots(rows), self._x, self.outputs)
        self._end()

    def put(self, expert_idx: int, output: torch.Tensor) -> None:
        """An expert's output that was computed elsewhere, ``[rows that chose it, H]`` in their order."""
        self._missing.discard(expert_idx)
        rows = [row for row, ids in enumerate(self._ids) if expert_idx in ids]
        for row, values in zip(rows, output, strict=True):
            for k, chosen in enumerate(self._ids[row]):
                if chosen == expert_idx:
                    self.outputs[row, k] = values
        self._end()

    def _end(self) -> None:
        if not self._missing:
            present = self._slots({expert_idx: 0 for row in self._ids for expert_idx in row if expert_idx != ABSENT})
            self._experts.kernels.combine(self.outputs, present, self._weights, self.result)

    def _slots(self, row_of: dict[int, int]) -> torch.Tensor:
        return sent([[row_of.get(expert_idx, ABSENT) for expert_idx in ids] for ids in self._ids], self._x.device)


class SlotRows:
    """The rows of a prompt by expert: outputs ``[T * K, H]`` of all pairs, some experts at a time."""

    def __init__(
        self, experts: SlotExperts, x: torch.Tensor, order: torch.Tensor, ends: torch.Tensor, *, is_partial: bool
    ) -> None:
        """``order [P]``: pairs ``t * K + k`` by expert; ``ends [E]``: where in it each expert's pairs end.

        ``is_partial``: some pairs stand for no expert, and are zero.
        """
        self._experts, self._x = experts, x.contiguous()
        self._num_experts = len(ends)
        self._offsets = torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)
        self._out_rows = order.to(torch.int32)
        self._x_rows = (order // (len(order) // len(x))).to(torch.int32)
        shape = (len(order), experts.mlp.output_size)
        self.outputs = x.new_zeros(shape) if is_partial else x.new_empty(shape)

    def compute(self, batch: Batch) -> None:
        """Some of the experts, each of which comes once."""
        for slab, row_of in _by_slab(batch):
            slots = sent([row_of.get(expert_idx, ABSENT) for expert_idx in range(self._num_experts)], self._x.device)
            self._experts.kernels.grouped_experts(
                self._experts.mlp,
                slab,
                slots,
                self._offsets,
                self._x,
                self._x_rows,
                self.outputs,
                self._out_rows,
            )


def _by_slab(batch: Batch) -> Iterator[tuple[torch.Tensor, dict[int, int]]]:
    """Each slab with its experts and their rows: the cache's slots are in one, those of staging in another."""
    slabs: dict[int, tuple[torch.Tensor, dict[int, int]]] = {}
    for expert_idx, weights in batch:
        _, rows = slabs.setdefault(weights.slab.data_ptr(), (weights.slab, {}))
        rows[expert_idx] = weights.row
    yield from slabs.values()


def sent(numbers: Iterable[object], device: torch.device) -> torch.Tensor:
    """Whole numbers as an int32 tensor on the device; nobody waits for them to get there."""
    here = torch.tensor(numbers, dtype=torch.int32, pin_memory=device.type == "cuda")
    return here.to(device, non_blocking=True)
