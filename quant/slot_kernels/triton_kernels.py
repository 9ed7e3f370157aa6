"""Slot kernels in Triton, for Nvidia GPUs from Turing on."""

from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_offload.quant.slot_kernels.slot_mlp import SlotMlp
from moe_offload.quant.slot_kernels.triton_decode import combine_outputs, decode_down, decode_up
from moe_offload.quant.slot_kernels.triton_grouped import grouped_down, grouped_up
from moe_offload.quant.slot_kernels.triton_mlp import PackedMlp, packed_mlp
from moe_offload.quant.slot_kernels.triton_shapes import decode_shape, grouped_shape
from moe_offload.quant.slot_kernels.triton_weight import narrowed, value_table

_COMBINE_BLOCK = 256
_AMPERE, _ADA = (8, 0), (8, 9)
_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


class TritonKernels:
    """One device's. Calls come one after another: they share counters, so never from two streams at a time."""

    name = "triton"
    reads_slots = False

    def __init__(self, device: torch.device) -> None:
        self._counters = [torch.zeros(1 << 15, dtype=torch.int32, device=device)]
        self._capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else _AMPERE
        # By identity, since a step asks for one a layer; the key's object is held so that it stays the only one.
        self._packed: dict[int, tuple[SlotMlp, PackedMlp]] = {}

    @staticmethod
    def check(mlp: SlotMlp) -> None:
        """`FormatError`, saying why, for weights that these kernels cannot read."""
        packed_mlp(mlp)

    def try_out(self) -> None:
        """Build and run a small kernel; whatever Triton raises where it cannot."""
        slots = self._counters[0].new_zeros(1, 1)
        outputs = slots.float()[None]
        self.combine(outputs, slots, outputs[0], outputs[0].clone())

    def decode_experts(self, mlp: SlotMlp, slab: Tensor, slots: Tensor, x: Tensor, outputs: Tensor) -> None:
        self._decode(mlp, slab, slots, x, outputs, None, x)

    def decode_layer(
        self, mlp: SlotMlp, slab: Tensor, slots: Tensor, x: Tensor, weights: Tensor, result: Tensor
    ) -> None:
        outputs = torch.empty(*slots.shape, mlp.output_size, device=x.device)
        if result.dtype == x.dtype:
            self._decode(mlp, slab, slots, x, outputs, weights, result)
        else:  # another dtype would make another kernel of it, whose outputs need not have the same bits
            self.decode_experts(mlp, slab, slots, x, outputs)
            self.combine(outputs, slots, weights, result)

    def _decode(
        self,
        mlp: SlotMlp,
        slab: Tensor,
        slots: Tensor,
        x: Tensor,
        outputs: Tensor,
        weights: Tensor | None,
        result: Tensor,
    ) -> None:
        packed = self._described(mlp)
        num_rows, top_k = slots.shape
        slot_bytes = slab.shape[1]
        hidden = torch.empty(num_rows * top_k, mlp.inner_size, device=x.device)
        up, down = decode_shape(packed.gate, top_k), decode_shape(packed.down, top_k)
        num_blocks = triton.cdiv(mlp.output_size, down.rows)
        x = _aligned(x)
        with _device_of(x):
            decode_up[(num_rows * top_k, triton.cdiv(mlp.inner_size, up.rows))](
                slab,
                slots,
                value_table(packed.gate_part, x.device),
                value_table(packed.up_part, x.device),
                x,
                hidden,
                SLOT_BYTES=slot_bytes,
                TOP_K=top_k,
                INNER=mlp.inner_size,
                GATE=packed.gate,
                UP=packed.up,
                GATE_BIAS=packed.gate_bias,
                UP_BIAS=packed.up_bias,
                ACTIVATION=packed.activation,
                ROWS=up.rows,
                STEP=up.step,
                num_warps=1,
            )
            decode_down[(num_rows * top_k, num_blocks)](
                slab,
                slots,
                value_table(mlp.down, x.device),
                hidden,
                outputs,
                outputs if weights is None else weights,
                result,
                self._room_for(num_rows * num_blocks),
                int(weights is not None),
                SLOT_BYTES=slot_bytes,
                TOP_K=top_k,
                OUTPUT=mlp.output_size,
                DOWN=packed.down,
                BIAS=packed.down_bias,
                ROWS=down.rows,
                STEP=down.step,
                num_warps=1,
            )

    def combine(self, outputs: Tensor, slots: Tensor, weights: Tensor, result: Tensor) -> None:
        num_rows, top_k = slots.shape
        num_cols = result.shape[1]
        with _device_of(outputs):
            combine_outputs[(num_rows, triton.cdiv(num_cols, _COMBINE_BLOCK))](
                outputs, slots, weights, result, TOP_K=top_k, OUTPUT=num_cols, BLOCK=_COMBINE_BLOCK
            )

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
        packed, x = self._described(mlp), _aligned(x)
        num_pairs, num_groups, slot_bytes = len(x_rows), len(slots), slab.shape[1]
        # Turing has no matrix units for bf16
        dtype = torch.float32 if x.dtype == torch.bfloat16 and self._capability < _AMPERE else x.dtype
        hidden = torch.empty(num_pairs, mlp.inner_size, dtype=dtype, device=x.device)
        shape = grouped_shape(packed, len(x), dtype, self._capability)
        gate, up, down = (narrowed(weight, shape.block_k) for weight in packed[:3])
        num_tiles = num_pairs // shape.block_m + num_groups  # that many at most
        groups = max(16, triton.next_power_of_2(num_groups))
        with _device_of(x):
            grouped_up[(num_tiles, triton.cdiv(mlp.inner_size, shape.block_n))](
                slab,
                slots,
                offsets,
                num_groups,
                value_table(packed.gate_part, x.device),
                value_table(packed.up_part, x.device),
                x,
                x_rows,
                hidden,
                SLOT_BYTES=slot_bytes,
                INNER=mlp.inner_size,
                GATE=gate,
                UP=up,
                GATE_BIAS=packed.gate_bias,
                UP_BIAS=packed.up_bias,
                ACTIVATION=packed.activation,
                DTYPE=_DTYPES[dtype],
                GROUPS=groups,
                BLOCK_M=shape.block_m,
                BLOCK_N=shape.block_n,
                BLOCK_K=shape.block_k,
                num_warps=shape.num_warps,
                num_stages=shape.num_stages,
            )
            grouped_down[(num_tiles, triton.cdiv(mlp.output_size, shape.block_n))](
                slab,
                slots,
                offsets,
                num_groups,
                value_table(mlp.down, x.device),
                hidden,
                outputs,
                out_rows,
                SLOT_BYTES=slot_bytes,
                OUTPUT=mlp.output_size,
                DOWN=down,
                BIAS=packed.down_bias,
                DTYPE=_DTYPES[dtype],
                GROUPS=groups,
                BLOCK_M=shape.block_m,
                BLOCK_N=shape.block_n,
                BLOCK_K=shape.block_k,
                num_warps=shape.num_warps,
                num_stages=shape.num_stages,
            )

    def _described(self, mlp: SlotMlp) -> PackedMlp:
        known = self._packed.get(id(mlp))
        if known is None:
            known = self._packed[id(mlp)] = mlp, packed_mlp(mlp, self._capability >= _ADA)
        return known[1]

    def _room_for(self, num_counters: int) -> Tensor:
        """Zeros, which every launch leaves as it found them. Outgrown ones stay: a captured graph may have them."""
        if num_counters > self._counters[-1].numel():
            self._counters.append(self._counters[-1].new_zeros(num_counters))
        return self._counters[-1]


def _aligned(x: Tensor) -> Tensor:
    """Rows from the middle of a batch would get another kernel, with narrower loads, that may sum in another order."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device; nothing for a tensor on the CPU."""
    context: AbstractContextManager[None] = torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]
    return context
