"""The router fit on states whose clusters are known."""

import math

import pytest
import torch

from moe_offload.offload.demo.router import FIRST_CHOICE_WEIGHT, fit_router

NUM_EXPERTS, WIDTH, TOKENS_PER_CLUSTER = 8, 32, 60


@pytest.fixture
def states() -> torch.Tensor:
    """Eight clusters around one far from the origin, as hidden states are: one cluster after the other."""
    generator = torch.Generator().manual_seed(3)
    common = 4 * torch.randn(WIDTH, generator=generator)
    centres = torch.randn(NUM_EXPERTS, 1, WIDTH, generator=generator)
    spread = 0.2 * torch.randn(NUM_EXPERTS, TOKENS_PER_CLUSTER, WIDTH, generator=generator)
    return (common + centres + spread).reshape(-1, WIDTH)


def test_each_cluster_gets_its_own_expert(states: torch.Tensor):
    gate = fit_router(states, num_experts=NUM_EXPERTS, top_k=2, seed=0)
    first = (states @ gate.T).argmax(1).view(NUM_EXPERTS, TOKENS_PER_CLUSTER)
    favourite = first.mode(1).values
    assert favourite.unique().numel() == NUM_EXPERTS
    assert (first == favourite[:, None]).float().mean() > 0.95


def test_load_is_even_though_clusters_are_not(states: torch.Tensor):
    uneven = torch.cat([states, states[:TOKENS_PER_CLUSTER].repeat(6, 1) * 1.01])
    gate = fit_router(uneven, num_experts=NUM_EXPERTS, top_k=2, seed=0)
    load = torch.bincount((uneven @ gate.T).topk(2).indices.flatten(), minlength=NUM_EXPERTS) / (2 * len(uneven))
    entropy = -(load * load.clamp(min=1e-9).log()).sum() / math.log(NUM_EXPERTS)
    assert entropy > 0.9


def test_first_choice_weighs_as_much_as_asked(states: torch.Tensor):
    gate = fit_router(states, num_experts=NUM_EXPERTS, top_k=2, seed=0)
    weights = (states @ gate.T).topk(2).values.softmax(1)
    assert weights[:, 0].mean() == pytest.approx(FIRST_CHOICE_WEIGHT, abs=0.01)


def test_a_seed_gives_one_gate(states: torch.Tensor):
    gates = [fit_router(states, num_experts=NUM_EXPERTS, top_k=2, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(gates[0], gates[1])
    assert not torch.equal(gates[0], gates[2])
