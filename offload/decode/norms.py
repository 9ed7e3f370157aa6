"""RMS norms in one call, rounded where the module rounds: torch takes six operations, each through memory."""

import copy
from typing import Any

import torch
from torch import nn

from moe_offload.offload.decode.fused_forward import FusedForward, Memory, is_plain
from moe_offload.quant.step import NormCall
from moe_offload.quant.step_weights import Norm

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PROBE_ROWS = 8
# Whether it is rounded before the weight, and what is added to the weight: Llama, OLMoE, Gemma and Qwen3-Next.
_Reading = tuple[bool, float]
_READINGS: tuple[_Reading, ...] = ((True, 0.0), (False, 0.0), (False, 1.0))
# Sums in another order differ in the last bit of fp32, and so may a few results once they are rounded.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
_MOST_DIFFERENT = {torch.float32: 1.0, torch.bfloat16: 0.01, torch.float16: 0.05}


class FusedNorm(FusedForward):
    """The forward of an RMS norm."""

    def __init__(self, module: nn.Module, norm: Norm) -> None:
        super().__init__(module)
        self.norm = norm
        self._call = NormCall(norm)
        self._memory = Memory((module, "weight"))
        self._width = norm.weight.shape[0]

    def __call__(self, hidden_states: torch.Tensor) -> Any:
        if (
            hidden_states.numel() > 0
            and hidden_states.shape[-1] == self._width
            and _fits(self.norm, hidden_states.dtype)
            and is_plain(hidden_states, hidden_states.dtype)
            and self._memory.is_unchanged()
        ):
            return self._call(hidden_states)
        return self._eager(hidden_states)


def fuse_norms(model: nn.Module) -> None:
    """Give every RMS norm whose arithmetic is known a `FusedNorm`."""
    known: dict[tuple[type, torch.dtype], _Reading | None] = {}
    for module in model.modules():
        norm = _candidate(module)
        if norm is None:
            continue
        key = (type(module), norm.weight.dtype)
        if key not in known:
            known[key] = _reading_of(module, norm)
        reading = known[key]
        if reading is not None:
            FusedNorm(module, Norm(norm.weight, norm.epsilon, *reading))


def fused_norm(module: nn.Module) -> Norm | None:
    """What a module computes, if `fuse_norms` has found that out."""
    forward = module.__dict__.get("forward")
    return forward.norm if isinstance(forward, FusedNorm) else None


def _candidate(module: nn.Module) -> Norm | None:
    """A module that looks like an RMS norm: one weight, one epsilon, a name that says so."""
    if not type(module).__name__.endswith("RMSNorm") or list(module._parameters) != ["weight"] or module._buffers:
        return None
    weight = module._parameters["weight"]
    epsilon = module.__dict__.get("variance_epsilon", module.__dict__.get("eps"))
    if weight is None or weight.dim() != 1 or weight.dtype not in _DTYPES or not isinstance(epsilon, float):
        return None
    return Norm(weight.detach(), epsilon, rounds_first=True)


def _fits(norm: Norm, dtype: torch.dtype) -> bool:
    """Whether the result is in ``dtype``, as the input: a weight that comes last may make it wider."""
    return dtype is norm.weight.dtype or (not norm.rounds_first and dtype in _DTYPES)


@torch.no_grad()
def _reading_of(module: nn.Module, norm: Norm) -> _Reading | None:
    """What the module's own forward does, tried with a random weight; None if it is something else."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(norm.weight.shape).uniform_(0.5, 1.5, generator=generator).to(norm.weight.dtype)
    twin = copy.copy(module)
    twin._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    dtypes = [norm.weight.dtype] if norm.weight.dtype != torch.float32 else [torch.float32, torch.bfloat16]
    for reading in _READINGS:
        trial = Norm(weight, norm.epsilon, *reading)
        usable = [dtype for dtype in dtypes if _fits(trial, dtype)]
        if usable and all(_agrees(twin, trial, dtype, generator) for dtype in usable):
            return reading
    return None


def _agrees(module: nn.Module, norm: Norm, dtype: torch.dtype, generator: torch.Generator) -> bool:
    rows = torch.randn(_PROBE_ROWS, norm.weight.shape[0], generator=generator).to(dtype)
    expected, found = module(rows), NormCall(norm)(rows)
    if expected.dtype != dtype:
        return False
    difference = (expected.float() - found.float()).abs()
    share = float((difference > 0).float().mean())
    return bool((difference <= _TOLERANCE[dtype] * expected.float().abs()).all()) and share <= _MOST_DIFFERENT[dtype]
