"""Slabs of random experts, as kernels find them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_offload.quant import get_format
from moe_offload.quant.activation import Activation
from moe_offload.quant.layout import align_up
from moe_offload.quant.slot_kernels import SlotMlp, SlotPart

GPT_OSS = Activation("sigmoid", "interleaved", 1.702, gate_limit=7.0, up_limit=7.0, up_shift=1.0)
SILU = Activation("sigmoid")


@dataclass(frozen=True)
class SlotSlab:
    """Experts' weights in the slots of a slab, and the MLP that they are."""

    mlp: SlotMlp
    data: Tensor

    def reference(self, slot: int, x: Tensor) -> Tensor:
        """What the expert in a slot makes of rows, in float64 from the dequantised weights."""

        def weight(part: SlotPart) -> Tensor:
            packed = part.packed(self.data[slot])
            return part.format.dequantize(packed, part.shape, torch.float32).double()

        mlp = self.mlp
        inner = x.double() @ torch.cat([weight(part) for part in mlp.up]).T
        inner = mlp.activation(inner if mlp.up_bias is None else inner + weight(mlp.up_bias))
        output = inner @ weight(mlp.down).T
        return output if mlp.down_bias is None else output + weight(mlp.down_bias)

    def to(self, device: torch.device) -> "SlotSlab":
        return SlotSlab(self.mlp, self.data.to(device))


def random_slab(
    spec: str | Sequence[str],
    *,
    hidden: int = 128,
    inner: int = 64,
    num_slots: int = 4,
    activation: Activation = SILU,
    bias: str | None = None,
    num_pieces: int = 1,
    seed: int = 0,
    is_empty: bool = False,
) -> SlotSlab:
    """``spec``: the format of all weights, or those of the pieces of ``up`` and of ``down``; ``is_empty``: zeros."""
    rows = inner if activation.gating == "none" else 2 * inner
    specs = [spec] * (num_pieces + 1) if isinstance(spec, str) else list(spec)
    num_pieces = len(specs) - 1
    shapes: list[tuple[str, tuple[int, ...]]] = [(name, (rows // num_pieces, hidden)) for name in specs[:-1]]
    shapes.append((specs[-1], (hidden, inner)))
    if bias is not None:
        shapes += [(bias, (rows,)), (bias, (hidden,))]
    parts, end = [], 0
    for name, shape in shapes:
        parts.append(SlotPart(get_format(name), shape, end))
        end = align_up(end + parts[-1].format.nbytes(shape))
    generator = torch.Generator().manual_seed(seed)
    data = torch.zeros(num_slots, -(-end // 4096) * 4096, dtype=torch.uint8)
    for slot in () if is_empty else data:
        for part in parts:
            values = torch.randn(part.shape, generator=generator) * (1 if len(part.shape) == 1 else 0.1)
            part.packed(slot).copy_(part.format.quantize(values))
    biases = parts[num_pieces + 1 :] if bias is not None else [None, None]
    return SlotSlab(SlotMlp(tuple(parts[:num_pieces]), parts[num_pieces], activation, *biases), data)


def assert_near(result: Tensor, expected: Tensor, tolerance: float) -> None:
    """By the largest of the expected numbers."""
    error = (result.double() - expected.double()).abs().max() / expected.abs().max()
    assert error < tolerance, f"{error:.2e}"
