"""Dense linear layers of few rows, straight from their weights: read once, on the kernels' own threads."""

from typing import Any

import torch
from torch import nn

from moe_offload.offload.decode.fused_forward import MAX_ROWS, FusedForward, Memory, is_plain
from moe_offload.offload.dense_linears import PackedLinear
from moe_offload.quant.step import LinearCall
from moe_offload.quant.step_weights import PackedProjection, RawWeight

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class FusedLinear(FusedForward):
    """The forward of an ``nn.Linear``."""

    def __init__(self, module: nn.Linear) -> None:
        super().__init__(module)
        self._call = LinearCall(raw_weight(module))
        self._memory = Memory((module, "weight"), (module, "bias"))
        self._dtype, self._in_features = module.weight.dtype, module.in_features

    def __call__(self, hidden_states: torch.Tensor) -> Any:
        if (
            0 < hidden_states.numel() <= MAX_ROWS * self._in_features
            and hidden_states.shape[-1] == self._in_features
            and is_plain(hidden_states, self._dtype)
            and self._memory.is_unchanged()
        ):
            return self._call(hidden_states)
        return self._eager(hidden_states)


def fuse_linears(model: nn.Module) -> None:
    """Give every plain ``nn.Linear`` a `FusedLinear`."""
    for module in model.modules():
        if type(module) is nn.Linear and _is_readable(module):
            FusedLinear(module)


def projection_of(module: nn.Module) -> RawWeight | PackedProjection | None:
    """What kernels need of a linear layer, plain or packed; None for any other module."""
    if type(module) is nn.Linear and _is_readable(module):
        return raw_weight(module)
    if isinstance(module, PackedLinear):
        return module.projection()
    return None


def compute_dtype(module: Any) -> torch.dtype:
    """The dtype of what a linear layer takes and gives."""
    dtype: torch.dtype = module.compute_dtype if isinstance(module, PackedLinear) else module.weight.dtype
    return dtype


def raw_weight(module: nn.Linear) -> RawWeight:
    """The weight and bias of a plain linear layer."""
    return RawWeight(module.weight.detach(), None if module.bias is None else module.bias.detach())


def _is_readable(module: nn.Linear) -> bool:
    weight = module._parameters.get("weight")
    if weight is None:  # an expert's, which is in a slot
        return False
    return weight.is_cpu and weight.is_contiguous() and weight.dtype in _DTYPES and weight.numel() > 0
