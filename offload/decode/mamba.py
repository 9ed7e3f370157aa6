"""The Mamba 2 layers of a model, one token at a time in one call."""

from typing import Any

import torch

from moe_offload.offload.decode.linears import compute_dtype, projection_of
from moe_offload.offload.decode.recurrent_forward import RecurrentForward, StateShapes, fuse_recurrent
from moe_offload.quant.mamba_step import MambaCall, MambaWeights
from moe_offload.quant.step_weights import Norm

_CLASSES = frozenset({"GraniteMoeHybridMambaLayer", "NemotronHMamba2Mixer"})
_NAMES = ("in_proj", "conv1d", "norm", "out_proj")


class FusedMamba(RecurrentForward):
    """The forward of a Mamba 2 layer."""


def fuse_mambas(model: Any) -> None:
    """Give Mamba 2 layers a `FusedMamba` where the kernel was seen to compute the same."""
    fuse_recurrent(model, _prepare, FusedMamba, _NAMES)


def _prepare(module: Any) -> tuple[MambaCall, StateShapes] | None:
    weights = _weights(module)
    if weights is None:
        return None
    dtype = compute_dtype(module.out_proj)
    state = torch.Size((1, weights.num_heads, weights.head_dim, weights.state_size))
    return MambaCall(weights, dtype), StateShapes(torch.Size((1, *weights.convolution.shape)), state, dtype)


def _weights(module: Any) -> MambaWeights | None:
    """What the kernel needs of a module that is known by its class; None if some of it is not as expected."""
    if type(module).__name__ not in _CLASSES or not set(_NAMES) <= set(module._modules) or module.activation != "silu":
        return None
    dtype = compute_dtype(module.out_proj)
    projections = projection_of(module.in_proj), projection_of(module.out_proj)
    convolution, norm = module.conv1d, module.norm
    held = (norm.weight, convolution.weight, *([] if convolution.bias is None else [convolution.bias]))
    inner = module.num_heads * module.head_dim
    if projections[0] is None or projections[1] is None or any(tensor.dtype != dtype for tensor in held):
        return None
    if module.intermediate_size != inner or norm.group_size != inner // module.n_groups:
        return None
    return MambaWeights(
        input=projections[0],
        output=projections[1],
        norm=Norm(norm.weight.detach(), norm.variance_epsilon, rounds_first=True),
        convolution=convolution.weight.detach().squeeze(1),
        convolution_bias=None if convolution.bias is None else convolution.bias.detach(),
        step_bias=module.dt_bias.detach(),
        decay_log=module.A_log.detach(),
        skip=module.D.detach(),
        num_heads=module.num_heads,
        head_dim=module.head_dim,
        num_groups=module.n_groups,
        state_size=module.ssm_state_size,
    )
