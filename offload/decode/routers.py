"""Routers: their own forward, with the one matrix product in it computed by the kernels.

The product is small, but torch wakes its threads for it, and waits for them. Everything after it, which families do in
ways of their own, is the module's code as it stands.
"""

import types
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from moe_offload.offload.decode.fused_forward import FusedForward, Memory, is_plain
from moe_offload.quant.step import LinearCall
from moe_offload.quant.step_weights import RawWeight

_MAX_ROWS = 2
_PROBE_ROWS = 8
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Logits may be rounded the other way now and then, and what follows from them with them.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class _Functional:
    """``torch.nn.functional`` as one router sees it."""

    def __init__(self, router: nn.Module) -> None:
        self._router = router
        names = [name for name in ("weight", "bias") if router._parameters.get(name) is not None]
        weight, bias = (router._parameters.get(name) for name in ("weight", "bias"))
        assert weight is not None, "a router has a weight"
        self._call = LinearCall(RawWeight(weight.detach(), None if bias is None else bias.detach()))
        self._memory = Memory(*((router, name) for name in names))

    def __getattr__(self, name: str) -> Any:
        return getattr(functional, name)

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The kernels' for few rows."""
        if not 0 < x.numel() <= _MAX_ROWS * weight.shape[1] or not is_plain(x, weight.dtype):
            return functional.linear(x, weight, bias)
        parameters = self._router._parameters
        if weight is parameters.get("weight") and bias is parameters.get("bias") and self._memory.is_unchanged():
            return self._call(x)
        return functional.linear(x, weight, bias)


class FusedRouter(FusedForward):
    """The forward of a router."""

    def __init__(self, module: nn.Module, forward: Any) -> None:
        super().__init__(module)
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        return self._forward(*args, **kwargs)


def fuse_routers(model: nn.Module) -> None:
    """Give routers a `FusedRouter` whose own forward calls ``F.linear`` on their weight."""
    known: dict[Any, bool] = {}
    for module in model.modules():
        forward = _with_own_linear(module)
        if forward is None:
            continue
        kind = (type(module), *((name, tensor.shape, tensor.dtype) for name, tensor in module.named_parameters()))
        if kind not in known:
            known[kind] = _agrees(module, forward)
        if known[kind]:
            FusedRouter(module, forward)


def _with_own_linear(module: nn.Module) -> Any:
    """The module's forward, with another ``F``; None for what is no router or computes in another way."""
    forward = type(module).forward
    weight = module._parameters.get("weight")
    if (
        not type(module).__name__.endswith("Router")
        or not isinstance(forward, types.FunctionType)
        or not {"F", "linear"} <= set(forward.__code__.co_names)
        or forward.__globals__.get("F") is not functional
        or weight is None
        or weight.dim() != 2
        or not is_plain(weight.data, weight.dtype)
        or weight.dtype not in _DTYPES
    ):
        return None
    names = forward.__globals__ | {"F": _Functional(module)}
    own = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    own.__kwdefaults__ = forward.__kwdefaults__
    return types.MethodType(own, module)


@torch.no_grad()
def _agrees(module: nn.Module, forward: Any) -> bool:
    """Whether both forwards choose the same experts, with the same weights, for random rows one by one."""
    weight = module._parameters["weight"]
    assert weight is not None, "a router has a weight"
    generator = torch.Generator().manual_seed(0)
    same_choices = 0
    for _ in range(_PROBE_ROWS):
        row = torch.randn(1, weight.shape[1], generator=generator).to(weight.dtype)
        try:
            expected, found = module(row), forward(row)
        except TypeError:  # it takes more than hidden states
            return False
        if not isinstance(expected, tuple):
            expected, found = (expected,), (found,)
        choices = [torch.equal(a, b) for a, b in zip(expected, found, strict=True) if not a.is_floating_point()]
        numbers = [(a, b) for a, b in zip(expected, found, strict=True) if a.is_floating_point()]
        if any(a.dtype != b.dtype or a.shape != b.shape for a, b in numbers):
            return False
        if all(choices):
            same_choices += 1
            tolerance = _TOLERANCE[weight.dtype]
            if not all(torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(a.abs().max())) for a, b in numbers):
                return False
    # Of two experts with nearly the same logit either may be chosen.
    return same_choices >= _PROBE_ROWS - 1
