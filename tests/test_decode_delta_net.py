"""Fused decode steps of models with gated delta nets, and gated attention, against their own forwards."""

import copy
from functools import cache, partial
from typing import Any

import decode_runs
import pytest
import torch
from decode_runs import DECODE_STEPS, PROMPT_TOKENS, counted_calls, decode, fused, pack_of, step
from family_runs import load_smallest
from transformers import DynamicCache

from moe_offload.offload.decode.attention import FusedAttention
from moe_offload.offload.decode.delta_net import FusedDeltaNet
from moe_offload.offload.decode.norms import FusedNorm
from moe_offload.quant import backend_name
from moe_offload.quant.delta_net import DeltaNetCall

pytestmark = pytest.mark.skipif(backend_name() == "torch", reason="no kernels were built")

FAMILIES = ("qwen3_next", "qwen3_5_moe_text")
# What a head answers may be nearly nothing, and a norm makes as much of it as of any other answer.
close = partial(decode_runs.close, tolerance=1e-3)


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cache(lambda family: pack_of(family, tmp_path_factory.mktemp(family)))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """An entry for every token that went through the kernel."""
    return counted_calls(DeltaNetCall, monkeypatch)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_eager_model(family, both, calls):
    model, eager = both(family)
    assert not fused(eager, FusedDeltaNet)
    assert fused(model, FusedDeltaNet) == [f"model.layers.{idx}.linear_attn" for idx in range(3)]
    assert fused(model, FusedAttention) == ["model.layers.3.self_attn"]
    assert {"model.norm", "model.layers.0.input_layernorm", "model.layers.3.self_attn.q_norm"} <= set(
        fused(model, FusedNorm)
    )
    calls.clear()  # what loading tried
    assert close(decode(model), decode(eager))
    assert len(calls) == 3 * (DECODE_STEPS - 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_sixteen_bits_are_fused(family, dtype, packs):
    with load_smallest(packs(family), dtype=str(dtype).partition(".")[2]) as model:
        assert len(fused(model.model, FusedDeltaNet)) == 3
        assert len(fused(model.model, FusedAttention)) == 1


@pytest.mark.parametrize("options", [{"batch_size": 2}, {"num_beams": 3}, {"use_cache": False}])
def test_whatever_is_not_one_plain_token_goes_the_old_way(options, both, calls):
    model, eager = both("qwen3_next")
    calls.clear()
    assert close(decode(model, **options), decode(eager, **options))
    assert not calls


def test_a_mask_that_hides_something_is_heeded(both):
    model, eager = both("qwen3_next")
    padded = {"attention_mask": torch.tensor([[0] * 3 + [1] * (PROMPT_TOKENS - 3)])}
    assert close(decode(model, **padded), decode(eager, **padded))


def test_a_hook_on_a_projection_sees_it(both, calls):
    model, eager = both("qwen3_next")
    seen = []
    calls.clear()
    for one in (model, eager):
        hooked = one.model.layers[0].linear_attn.in_proj_ba
        hooked.register_forward_hook(lambda _, args, out: seen.append(1) or out * 2)
    assert close(decode(model), decode(eager))
    assert len(seen) == 2 * DECODE_STEPS
    assert len(calls) == 2 * (DECODE_STEPS - 1), "the other layers have no hook"


def test_another_weight_is_used_at_once(both):
    model, eager = both("qwen3_5_moe_text")
    for one in (model, eager):
        net = one.model.layers[0].linear_attn
        net.A_log.data = net.A_log.flip(0).clone()
        net.conv1d.weight.data = net.conv1d.weight.flip(0).clone()
    assert close(decode(model), decode(eager))


def test_a_cache_stays_transformers_own(both):
    """Steps, a prompt in between, a copy, and a reordering."""
    model, eager = both("qwen3_next")
    outputs: list[list[torch.Tensor]] = []
    for one in (model, eager):
        cache = DynamicCache(config=one.config)
        seen = [step(one, cache, list(range(3, 12))), *(step(one, cache, [20 + i]) for i in range(4))]
        twin = copy.deepcopy(cache)
        seen += [step(one, cache, [40, 41, 42]), step(one, cache, [43])]
        seen += [step(one, twin, [50]), step(one, twin, [51])]
        cache.reorder_cache(torch.tensor([0]))
        seen += [step(one, cache, [70 + i]) for i in range(4)]
        outputs.append(seen)
    assert all(close(found, expected) for found, expected in zip(*outputs, strict=True))
