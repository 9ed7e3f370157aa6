"""The gated delta nets of a model, one token at a time in one call."""

from typing import Any

import torch

from moe_offload.offload.decode.linears import compute_dtype, projection_of
from moe_offload.offload.decode.recurrent_forward import RecurrentForward, StateShapes, fuse_recurrent
from moe_offload.quant.delta_net import DeltaNetCall, DeltaNetWeights
from moe_offload.quant.step_weights import Norm

_CLASSES = frozenset({"Qwen3NextGatedDeltaNet", "Qwen3_5MoeGatedDeltaNet"})
_GROUPED, _SEPARATE = ("in_proj_qkvz", "in_proj_ba"), ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
_OTHERS = ("conv1d", "norm", "out_proj")


class FusedDeltaNet(RecurrentForward):
    """The forward of a gated delta net."""


def fuse_delta_nets(model: Any) -> None:
    """Give gated delta nets a `FusedDeltaNet` where the kernel was seen to compute the same."""
    fuse_recurrent(model, _prepare, FusedDeltaNet, (*_GROUPED, *_SEPARATE, *_OTHERS))


def _prepare(module: Any) -> tuple[DeltaNetCall, StateShapes] | None:
    weights = _weights(module)
    if weights is None:
        return None
    dtype = compute_dtype(module.out_proj)
    state = torch.Size((1, weights.num_value_heads, weights.key_dim, weights.value_dim))
    return DeltaNetCall(weights, dtype), StateShapes(torch.Size((1, *weights.convolution.shape)), state, dtype)


def _weights(module: Any) -> DeltaNetWeights | None:
    """What the kernel needs of a module that is known by its class; None if some of it is not as expected."""
    if type(module).__name__ not in _CLASSES:
        return None
    held = module._modules
    if set(held) not in ({*_GROUPED, *_OTHERS}, {*_SEPARATE, *_OTHERS}) or module.activation != "silu":
        return None
    dtype = compute_dtype(module.out_proj)
    convolution, norm = module.conv1d, module.norm
    if convolution.bias is not None or norm.weight.dtype != dtype or convolution.weight.dtype != dtype:
        return None
    names = [name for name in (*_GROUPED, *_SEPARATE, "out_proj") if name in held]
    projections = {}
    for name in names:
        projection = projection_of(held[name])
        if projection is None:
            return None
        projections[name] = projection
    return DeltaNetWeights(
        mixed=projections[names[0]],
        gate=projections.get("in_proj_z"),
        beta=projections["in_proj_ba" if "in_proj_ba" in held else "in_proj_b"],
        decay=projections.get("in_proj_a"),
        output=projections["out_proj"],
        norm=Norm(norm.weight.detach(), norm.variance_epsilon, rounds_first=True),
        convolution=convolution.weight.detach().squeeze(1),
        decay_bias=module.dt_bias.detach(),
        decay_log=module.A_log.detach(),
        num_key_heads=module.num_k_heads,
        num_value_heads=module.num_v_heads,
        key_dim=module.head_k_dim,
        value_dim=module.head_v_dim,
    )
