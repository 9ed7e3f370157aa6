"""What stands between an MLP's products, in Triton; `quant.activation` has the same in plain torch."""

from typing import NamedTuple

import triton
import triton.language as tl

from moe_offload.quant.activation import FUNCTIONS, Activation

_SIGMOID = tl.constexpr(FUNCTIONS.index("sigmoid"))
_GELU_TANH = tl.constexpr(FUNCTIONS.index("gelu_tanh"))
_GELU = tl.constexpr(FUNCTIONS.index("gelu"))
_RELU = tl.constexpr(FUNCTIONS.index("relu"))
_INFINITY = tl.constexpr(float("inf"))
_NAN_STAYS = tl.constexpr(tl.PropagateNan.ALL)


class GateFunction(NamedTuple):
    """The numbers of an `Activation`, all compiled in."""

    function: int
    has_gate: bool
    alpha: float
    gate_limit: float
    activated_limit: float
    up_limit: float
    up_shift: float


def gate_function(activation: Activation) -> GateFunction:
    return GateFunction(
        FUNCTIONS.index(activation.function),
        activation.gating != "none",
        activation.alpha,
        activation.gate_limit,
        activation.activated_limit,
        activation.up_limit,
        activation.up_shift,
    )


@triton.jit
def activate(x, A: tl.constexpr):
    """The function alone, on fp32."""
    if A.function == _SIGMOID:
        return x * tl.sigmoid(x * A.alpha)
    elif A.function == _GELU_TANH:
        # (1 + tanh(u)) / 2 = sigmoid(2 u), with u = sqrt(2 / pi) (x + 0.044715 x**3)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif A.function == _GELU:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        positive = tl.maximum(x, 0.0, propagate_nan=_NAN_STAYS)
        return positive if A.function == _RELU else positive * positive


@triton.jit
def gated(gate, up, A: tl.constexpr):
    """``activate(gate)`` and its limits, times what ``up`` becomes."""
    if A.gate_limit < _INFINITY:
        gate = tl.minimum(gate, A.gate_limit, propagate_nan=_NAN_STAYS)
    activated = activate(gate, A)
    if A.activated_limit < _INFINITY:
        activated = tl.minimum(activated, A.activated_limit, propagate_nan=_NAN_STAYS)
    if A.up_limit < _INFINITY:
        up = tl.minimum(up, A.up_limit, propagate_nan=_NAN_STAYS)
        up = tl.maximum(up, -A.up_limit, propagate_nan=_NAN_STAYS)
    return activated * (up + A.up_shift)
