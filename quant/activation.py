"""What stands between the products of an expert's MLP, as numbers that kernels can take."""

import ctypes
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

# Indices are the numbers in csrc/activation.h.
FUNCTIONS = ("sigmoid", "gelu_tanh", "gelu", "relu", "relu_squared")
GATINGS = ("halves", "interleaved", "none")


class _Activation(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_int32),
        ("gating", ctypes.c_int32),
        ("alpha", ctypes.c_float),
        ("gate_limit", ctypes.c_float),
        ("activated_limit", ctypes.c_float),
        ("up_limit", ctypes.c_float),
        ("up_shift", ctypes.c_float),
    )


@dataclass(frozen=True)
class Activation:
    """``min(f(min(gate, gate_limit)), activated_limit) * (clamp(up, -up_limit, up_limit) + up_shift)``.

    ``gating`` says where gates and ups lie in a row: in its halves, by turns, or there are gates alone, of which
    ``f(gate)`` is all. ``f`` "sigmoid" is ``x * sigmoid(alpha * x)``: SiLU with alpha 1, quick GELU with 1.702.
    """

    function: str
    gating: str = "halves"
    alpha: float = 1.0
    gate_limit: float = math.inf
    activated_limit: float = math.inf
    up_limit: float = math.inf
    up_shift: float = 0.0

    @cached_property
    def struct(self) -> ctypes.Structure:
        """As kernels take it."""
        limits = (self.gate_limit, self.activated_limit, self.up_limit)
        return _Activation(
            FUNCTIONS.index(self.function), GATINGS.index(self.gating), self.alpha, *limits, self.up_shift
        )

    def __call__(self, hidden: Tensor) -> Tensor:
        """Plain torch: ``[T, 2 I]``, or ``[T, I]`` without ups, to ``[T, I]``."""
        if self.gating == "none":
            return self._function(hidden)
        if self.gating == "halves":
            gate, up = hidden.chunk(2, dim=-1)
        else:
            gate, up = hidden[..., ::2], hidden[..., 1::2]
        activated = self._function(gate.clamp(max=self.gate_limit)).clamp(max=self.activated_limit)
        return activated * (up.clamp(-self.up_limit, self.up_limit) + self.up_shift)

    def _function(self, x: Tensor) -> Tensor:
        if self.function == "sigmoid":
            return x * torch.sigmoid(self.alpha * x)
        if self.function == "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        if self.function == "gelu":
            return F.gelu(x)
        return F.relu(x) if self.function == "relu" else F.relu(x).square()
