"""The sum over a token's experts, one token at a time and several at once, against the formula."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from moe_offload.offload.experts.layer import ExpertLayer, StepState

NUM_EXPERTS, HIDDEN = 6, 3


class BackwardsResidency:
    """Has every expert; computes them in the order opposite to the one asked for. An expert's weights: its number."""

    observer = peers = None

    def run(self, layer_idx: int, expert_ids: Sequence[int], compute: Callable[[int, Any], None], **_: Any) -> None:
        assert len(set(expert_ids)) == len(expert_ids)
        for expert_idx in reversed(expert_ids):
            compute(expert_idx, expert_idx)


@pytest.fixture
def layer() -> ExpertLayer:
    return ExpertLayer(0, NUM_EXPERTS, BackwardsResidency(), StepState())  # type: ignore[arg-type]


def routed_by_formula(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    result = torch.zeros(x.shape)
    for t, k in torch.cartesian_prod(*map(torch.arange, index.shape)).tolist():
        if index[t, k] < NUM_EXPERTS:
            result[t] += weights[t, k].float() * (x[t].float() * (index[t, k] + 1))
    return result.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "index",
    [
        pytest.param([[4, 0, 2]], id="a token"),
        pytest.param([[4, 6, 2]], id="a token with a rank that stands for no expert"),
        pytest.param([[9, 6, 7]], id="a token without experts"),
        pytest.param([[1, 1, 5]], id="a token that names an expert twice"),
        pytest.param([[4, 0, 2], [0, 1, 2], [5, 3, 0]], id="tokens"),
        pytest.param([[4, 6, 2], [6, 6, 6], [5, 3, 0]], id="tokens with ranks that stand for no expert"),
        pytest.param([[6, 7, 8], [6, 6, 6]], id="tokens without experts"),
    ],
)
def test_the_sum_is_the_formulas(
    layer: ExpertLayer, index: list[list[int]], dtype: torch.dtype, weights_dtype: torch.dtype
) -> None:
    """Of small whole numbers, which every dtype holds exactly."""
    ids = torch.tensor(index)
    x = torch.arange(1.0, 1 + len(ids) * HIDDEN).view(-1, HIDDEN).to(dtype)
    weights = torch.tensor([[1.0, 2.0, 0.5]] * len(ids), dtype=weights_dtype)
    result = layer.routed(x, ids, weights, lambda expert_idx, rows: rows * (expert_idx + 1))  # type: ignore[operator]
    assert result.dtype == dtype
    assert torch.equal(result, routed_by_formula(x, ids, weights))


def test_no_tokens(layer: ExpertLayer) -> None:
    ids = torch.zeros(0, 2, dtype=torch.long)
    result = layer.routed(torch.zeros(0, HIDDEN), ids, torch.zeros(0, 2), lambda *_: pytest.fail("nobody asked"))
    assert result.shape == (0, HIDDEN)
