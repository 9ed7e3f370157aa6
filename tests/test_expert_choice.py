"""Experts that choose their tokens, from slots: against the same thing computed with all weights at hand."""

import math
from pathlib import Path

import pytest
import torch
from families import make_config
from family_runs import save_random_model
from loaded_models import check_health, loaded
from quantized_checkpoints import read_tensors
from torch import nn
from torch.nn import functional as F

from moe_offload.errors import ConfigError
from moe_offload.offload.experts.expert_choice import ExpertChoiceBlock
from moe_offload.offload.pack.packer import pack_model

NUM_EXPERTS, HIDDEN_SIZE = 8, 32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_random_model(make_config("mixtral"), tmp_path_factory.mktemp("choice") / "checkpoint")


@pytest.fixture(scope="module", params=["source", "nf4"])
def pack(request, checkpoint) -> Path:
    return pack_model(str(checkpoint), checkpoint.parent / request.param, format=request.param)


@pytest.fixture(scope="module")
def source_pack(checkpoint) -> Path:
    return pack_model(str(checkpoint), checkpoint.parent / "source", format="source")


@pytest.fixture
def router() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(HIDDEN_SIZE, NUM_EXPERTS, bias=False)


def block_on(model, router: nn.Module, capacity_factor: float = 2.0, layer_idx: int = 1) -> ExpertChoiceBlock:
    experts = model.model.get_submodule(model.manifest.layers[layer_idx].module)
    return ExpertChoiceBlock.on(experts, router, capacity_factor=capacity_factor)


def dense_expert_choice(tensors, layer_idx, router, x, capacity):
    """Zhou et al., equation by equation: S, then top-k of its transpose, a one-hot P, and the weighted sum."""
    scores = router(x).softmax(-1)  # S [T, E]
    gates, index = torch.topk(scores.T, capacity)  # G, I [E, C]
    one_hot = F.one_hot(index, len(x)).float()  # P [E, C, T]
    chosen = one_hot @ x  # [E, C, H]
    prefix = f"model.layers.{layer_idx}.block_sparse_moe.experts"
    outputs = []
    for expert_idx in range(NUM_EXPERTS):
        w1, w2, w3 = (tensors[f"{prefix}.{expert_idx}.{name}.weight"] for name in ("w1", "w2", "w3"))
        outputs.append((F.silu(chosen[expert_idx] @ w1.T) * (chosen[expert_idx] @ w3.T)) @ w2.T)
    return torch.einsum("ect,ec,ech->th", one_hot, gates, torch.stack(outputs))


@pytest.mark.parametrize("capacity_factor", [0.5, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("num_tokens", [1, 7, 40])
@torch.no_grad()
def test_it_equals_a_dense_reference(num_tokens, capacity_factor, source_pack, checkpoint, router):
    x = torch.randn(num_tokens, HIDDEN_SIZE, generator=torch.Generator().manual_seed(num_tokens))
    with loaded(source_pack, [2, 2, 2]) as model:
        block = block_on(model, router, capacity_factor)
        capacity = min(num_tokens, math.ceil(num_tokens * capacity_factor / NUM_EXPERTS))
        assert block.capacity(num_tokens) == capacity
        ours = block(x)
        check_health(model)
    expected = dense_expert_choice(read_tensors(checkpoint), 1, router, x, capacity)
    assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
def test_every_residency_gives_the_same_bits(pack, router):
    x = torch.randn(3, 5, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0))
    results = []
    for num_slots in (8, 3, 1):
        with loaded(pack, [num_slots] * 3) as model:
            block = block_on(model, router)
            results += [block(x), block(x)]  # cold, then with whatever stayed
            assert model._residency.cache.stats.snapshot().total.misses > 0
    for result in results[1:]:
        assert torch.equal(result, results[0])
    assert results[0].shape == x.shape


@torch.no_grad()
def test_padding_is_not_chosen(source_pack, router):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, HIDDEN_SIZE, generator=generator)
    mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    with loaded(source_pack, [8, 8, 8]) as model:
        block = block_on(model, router, 8.0)  # every expert takes every token
        masked = block(x, mask)
        alone = block(x[mask])
    assert torch.equal(masked[~mask], torch.zeros(4, HIDDEN_SIZE))
    assert torch.allclose(masked[mask], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_it_stands_in_for_a_block_of_a_model(source_pack, router):
    """As the docstring says it is used."""
    ids = torch.randint(3, 120, (2, 9), generator=torch.Generator().manual_seed(1))
    logits = []
    for num_slots in (8, 2):
        with loaded(source_pack, [num_slots] * 3) as model:
            plain = model.model(input_ids=ids).logits
            model.model.model.layers[1].mlp = block_on(model, router)
            logits.append(model.model(input_ids=ids).logits)
            assert not torch.allclose(plain, logits[-1], atol=1e-2)
            check_health(model)
    assert torch.equal(*logits)


def test_what_cannot_be_is_refused(source_pack, router):
    with loaded(source_pack, [8, 8, 8]) as model:
        for capacity_factor in (0.0, -1.0, 8.5):
            with pytest.raises(ConfigError, match=f"capacity_factor is {capacity_factor}; .* at most 8"):
                block_on(model, router, capacity_factor)
        with pytest.raises(ConfigError, match="Linear is not the experts module of an offloaded model"):
            ExpertChoiceBlock.on(model.model.lm_head, router)
