"""The activation of a family's experts is recognised for what it is, or not at all."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import make_config
from torch import Tensor, nn
from torch.nn import functional as F

from moe_offload.offload.checkpoint.transformers_loading import auto_class
from moe_offload.offload.experts.activations import find_activation
from moe_offload.offload.experts.containers import find_expert_containers
from moe_offload.offload.experts.forwards import strip_parameters
from moe_offload.quant.activation import Activation

GPT_OSS = Activation("sigmoid", "interleaved", 1.702, gate_limit=7.0, up_limit=7.0, up_shift=1.0)


def gated(activate: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def function(hidden: Tensor) -> Tensor:
        gate, up = hidden.chunk(2, dim=-1)
        return activate(gate) * up

    return function


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("mixtral", Activation("sigmoid")),
        ("gpt_oss", GPT_OSS),
        ("deepseek_v4", Activation("sigmoid", gate_limit=10.0, up_limit=10.0)),
        ("minimax_m3_vl_text", Activation("sigmoid", alpha=1.702, gate_limit=7.0, up_limit=7.0, up_shift=1.0)),
        ("gemma4_text", Activation("gelu_tanh")),
        ("nemotron_h", Activation("relu_squared", "none")),
        pytest.param("inkling2_text", None, id="an activation that takes gate and up together"),
    ],
)
def test_families(family: str, expected: Activation | None) -> None:
    config = make_config(family)
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    container = find_expert_containers(model)[0]
    strip_parameters(container)
    module: Any = container.module
    gate = module._apply_gate if module.has_gate else module.act_fn
    assert find_activation(module, gate, 64, has_gate=module.has_gate) == expected


@pytest.mark.parametrize(
    ("activate", "expected"),
    [
        (F.silu, Activation("sigmoid")),
        (lambda x: x * torch.sigmoid(1.702 * x), Activation("sigmoid", alpha=1.702)),
        (F.gelu, Activation("gelu")),
        (lambda x: F.gelu(x, approximate="tanh"), Activation("gelu_tanh")),
        (F.relu, Activation("relu")),
        (lambda x: F.relu(x).square(), Activation("relu_squared")),
        (F.hardswish, None),
        (F.mish, None),
        (torch.tanh, None),
        (lambda x: F.silu(x) * 1.001, None),
        (lambda x: F.silu(x).clamp(max=6.0), None),
    ],
)
def test_functions(activate: Callable[[Tensor], Tensor], expected: Activation | None) -> None:
    assert find_activation(nn.Module(), gated(activate), 64, has_gate=True) == expected


def test_limits_are_taken_from_the_module() -> None:
    module = nn.Module()
    module.limit = 4.0  # type: ignore[assignment]

    def step3(hidden: Tensor) -> Tensor:
        gate, up = hidden.chunk(2, dim=-1)
        return F.silu(gate).clamp(max=4.0) * up.clamp(-4.0, 4.0)

    expected = Activation("sigmoid", activated_limit=4.0, up_limit=4.0)
    assert find_activation(module, step3, 64, has_gate=True) == expected
    assert find_activation(module, gated(F.silu), 64, has_gate=True) == Activation("sigmoid")


def test_what_has_parameters_or_fails_is_left_alone() -> None:
    assert find_activation(nn.Linear(2, 2), gated(F.silu), 64, has_gate=True) is None
    assert find_activation(nn.Module(), lambda hidden: hidden["gate"], 64, has_gate=True) is None  # type: ignore
    assert find_activation(nn.Module(), lambda hidden: hidden.sum(), 64, has_gate=True) is None
