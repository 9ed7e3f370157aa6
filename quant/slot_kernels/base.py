"""What computes experts from the slots of a slab."""

from typing import Protocol

from torch import Tensor

from moe_offload.quant.slot_kernels.slot_mlp import SlotMlp


class SlotKernels(Protocol):
    """Kernels on one device. Shapes: R rows of activations, K experts of each (``top_k``), P pairs of both, G experts.

    ``slab``: ``uint8 [num_slots, slot_bytes]``, contiguous, at a multiple of 64 bytes as is ``slot_bytes``. Slots are
    ``int32``; -1 stands for an expert that is not here or is none. Whatever is passed lies on the device, and nothing
    is asked of it (only the plain kernels read slots on the host); all work goes to the current stream, and what is
    written is given by the caller, so that calls can be captured in a CUDA graph. The output of a pair is the same to
    the bit whatever else a call computes, in whichever slot its expert is; sums run in fp32 over k in order.
    """

    @property
    def name(self) -> str:
        """What it is, in a word."""

    @property
    def reads_slots(self) -> bool:
        """Whether the host reads slots, so that calls wait for the device and cannot be captured."""

    def decode_experts(self, mlp: SlotMlp, slab: Tensor, slots: Tensor, x: Tensor, outputs: Tensor) -> None:
        """A few rows: ``outputs`` fp32 ``[R, K, H]`` of ``x [R, in]`` by the experts in ``slots [R, K]``.

        What belongs to slot -1 is left as it is. ``x`` is fp32, bf16 or fp16, contiguous.
        """

    def decode_layer(
        self, mlp: SlotMlp, slab: Tensor, slots: Tensor, x: Tensor, weights: Tensor, result: Tensor
    ) -> None:
        """A few rows, all of whose experts are here, summed by ``weights`` fp32 ``[R, K]`` to ``result [R, H]``.

        ``result`` is fp32, bf16 or fp16. The same bits as of
        `decode_experts`, in any number of calls, and `combine` after them. Slot -1 contributes nothing.
        """

    def combine(self, outputs: Tensor, slots: Tensor, weights: Tensor, result: Tensor) -> None:
        """``result[r] = sum_k weights[r, k] * outputs[r, k]`` over those whose ``slots[r, k]`` is not negative."""

    def grouped_experts(
        self,
        mlp: SlotMlp,
        slab: Tensor,
        slots: Tensor,
        offsets: Tensor,
        x: Tensor,
        x_rows: Tensor,
        outputs: Tensor,
        out_rows: Tensor,
    ) -> None:
        """Many rows: row ``out_rows[i]`` of ``outputs [.., H]`` from row ``x_rows[i]`` of ``x [T, in]``.

        That is by the expert in ``slots[g]`` for ``offsets[g] <= i < offsets[g + 1]``. ``slots [G]``,
        ``offsets [G + 1]``, ``x_rows [P]`` and ``out_rows [P]`` are int32; ``offsets`` rises from 0 to P.
        ``x`` and ``outputs`` are fp32, bf16 or fp16, contiguous. What belongs to slot -1 is left as it is. Bits may
        depend on T, the number of rows of ``x``, beside the row itself and its expert.
        """
