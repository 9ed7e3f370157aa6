"""Which activation a container's experts have, found out by trying it on numbers.

Families write theirs as code (``_apply_gate``, ``act_fn``), which any of them may override. What it computes for a row
of numbers is compared with each formula that kernels know; one that none of them reproduces stays with its own code.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from moe_offload.quant.activation import Activation

_FUNCTIONS = (("sigmoid", 1.0), ("gelu", 1.0), ("gelu_tanh", 1.0), ("relu", 1.0), ("relu_squared", 1.0))
_QUICK_GELU_ALPHA = 1.702
# Attributes in which families keep the constants of their gates.
_ALPHAS, _LIMITS = ("alpha", "swiglu_alpha"), ("limit", "swiglu_limit")
_PROBE_ROWS = 4


def find_activation(
    container: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], num_cols: int, *, has_gate: bool
) -> Activation | None:
    """What ``function`` does to rows of ``num_cols`` numbers, or None if it is no formula that kernels know.

    None too for a container with parameters or buffers of its own: they may be part of it, and may change.
    """
    if any(True for _ in itertools.chain(container.parameters(), container.buffers())):
        return None
    alphas, limits = _constants(container, _ALPHAS), _constants(container, _LIMITS)
    x = _probe(num_cols, max([10.0, *limits]))
    try:
        expected = function(x.clone())
    except Exception:  # a family's own code: whatever it needs, it is not a plain formula
        return None
    for candidate in _candidates(alphas, limits, has_gate):
        actual = candidate(x)
        if actual.shape == expected.shape and torch.allclose(actual, expected.float(), rtol=1e-5, atol=1e-5):
            return candidate
    return None


def _constants(container: Any, names: tuple[str, ...]) -> list[float]:
    """Those of the attributes that are usable numbers."""
    values = [getattr(container, name, None) for name in names]
    return [float(value) for value in values if isinstance(value, (int, float)) and math.isfinite(value) and value > 0]


def _probe(num_cols: int, limit: float) -> torch.Tensor:
    """Rows of small numbers, where formulas differ most, and of such as lie beyond every limit."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_PROBE_ROWS, num_cols, generator=generator)
    x[_PROBE_ROWS // 2 :] *= limit
    return x


def _candidates(alphas: list[float], limits: list[float], has_gate: bool) -> Iterator[Activation]:
    """Every formula that the constants allow, likelier ones first."""
    functions = [*(("sigmoid", alpha) for alpha in alphas), *_FUNCTIONS, ("sigmoid", _QUICK_GELU_ALPHA)]
    if not has_gate:
        yield from (Activation(name, "none", alpha) for name, alpha in functions)
        return
    for (name, alpha), limit, gating in itertools.product(functions, (*limits, math.inf), ("halves", "interleaved")):
        for shift in (0.0, 1.0):
            yield Activation(name, gating, alpha, gate_limit=limit, up_limit=limit, up_shift=shift)
        if limit < math.inf:
            yield Activation(name, gating, alpha, activated_limit=limit, up_limit=limit)
