"""Whether the dense part of a decode step runs in the kernels or as transformers wrote it."""

import os

import torch
from torch import nn

from moe_offload.errors import ConfigError
from moe_offload.offload.decode.attention import fuse_attention
from moe_offload.offload.decode.delta_net import fuse_delta_nets
from moe_offload.offload.decode.latent_attention import fuse_latent_attention
from moe_offload.offload.decode.linears import fuse_linears
from moe_offload.offload.decode.mamba import fuse_mambas
from moe_offload.offload.decode.norms import fuse_norms
from moe_offload.offload.decode.prompt_attention import fuse_prompt_attention
from moe_offload.offload.decode.routers import fuse_routers
from moe_offload.offload.decode.step_threads import StepForward
from moe_offload.quant import backend_name

_ENVIRONMENT = "MOE_OFFLOAD_DENSE"
_MODES = ("fused", "eager")


def dense_mode() -> str:
    """ "fused", or "eager" where the environment says so or no kernels were built."""
    asked = os.environ.get(_ENVIRONMENT, _MODES[0])
    if asked not in _MODES:
        raise ConfigError(f"{_ENVIRONMENT}={asked} is not known; use {' or '.join(_MODES)}")
    return asked if backend_name() != "torch" else "eager"


def fuse_decode_step(model: nn.Module, device: torch.device) -> None:
    """Give the model's modules their fast forwards for few rows; what those cannot take goes the old way."""
    if device.type != "cpu" or dense_mode() == "eager":
        return
    fuse_norms(model)
    fuse_linears(model)
    fuse_routers(model)
    fuse_attention(model)
    fuse_latent_attention(model)
    fuse_delta_nets(model)
    fuse_mambas(model)
    fuse_prompt_attention(model)
    StepForward(model)
