"""The fused decode step of whole models against their own forwards, and when it stays out of the way."""

import copy
from functools import cache
from typing import Any

import pytest
import torch
from decode_runs import DECODE_STEPS, PROMPT_TOKENS, close, counted_calls, decode, fused, pack_of, step
from family_runs import load_smallest
from transformers import DynamicCache, StaticCache

from moe_offload.errors import ConfigError
from moe_offload.offload.decode.attention import FusedAttention
from moe_offload.offload.decode.choice import dense_mode
from moe_offload.offload.decode.kv_room import SPARE_TOKENS
from moe_offload.offload.decode.linears import FusedLinear
from moe_offload.offload.decode.norms import FusedNorm
from moe_offload.offload.decode.routers import FusedRouter
from moe_offload.offload.model import OffloadedModel
from moe_offload.quant import backend_name
from moe_offload.quant.step import AttentionCall

pytestmark = pytest.mark.skipif(backend_name() == "torch", reason="no kernels were built")

# A window shorter than the text, norms of heads and of all queries, sinks and a bias.
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"sliding_window": 16, "num_hidden_layers": 2},
    "qwen3_moe": {"num_hidden_layers": 2},
    "olmoe": {"num_hidden_layers": 2},
    "gpt_oss": {"num_hidden_layers": 2, "sliding_window": 16},
}


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cache(lambda family: pack_of(family, tmp_path_factory.mktemp(family), **FAMILIES[family]))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The position of every token that went through the attention kernel."""
    return counted_calls(AttentionCall, monkeypatch)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_eager_model(family, both, calls):
    model, eager = both(family)
    assert not any(fused(eager, kind) for kind in (FusedNorm, FusedLinear, FusedRouter, FusedAttention))
    assert "lm_head" in fused(model, FusedLinear)
    assert "model.norm" in fused(model, FusedNorm)
    assert len(fused(model, FusedRouter)) == 2, "one in each layer of experts"
    calls.clear()  # what loading tried
    assert close(decode(model), decode(eager))
    attention = ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert fused(model, FusedAttention) == attention
    assert len(calls) == len(attention) * (DECODE_STEPS - 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_in_sixteen_bits_is_fused(family, dtype, packs):
    with load_smallest(packs(family), dtype=str(dtype).partition(".")[2]) as model:
        assert len(fused(model.model, FusedAttention)) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 2},
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"output_attentions": True},
        {"use_cache": False},
    ],
)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_whatever_is_not_one_plain_token_goes_the_old_way(family, options, both, calls):
    model, eager = both(family)
    if options.get("output_attentions"):
        for one in (model, eager):
            one.set_attn_implementation("eager")
    calls.clear()
    assert close(decode(model, **options), decode(eager, **options))
    assert not calls


def test_a_mask_that_hides_something_goes_the_old_way(both, calls):
    model, eager = both("qwen3_moe")
    padded = {"attention_mask": torch.tensor([[0] * 3 + [1] * (PROMPT_TOKENS - 3)])}
    calls.clear()
    assert close(decode(model, **padded), decode(eager, **padded))
    assert not calls


def test_a_hook_on_a_projection_sees_it(both, calls):
    model, eager = both("mixtral")
    seen = []
    calls.clear()
    for one in (model, eager):
        one.model.layers[0].self_attn.v_proj.register_forward_hook(lambda _, args, out: seen.append(1) or out * 2)
    assert close(decode(model), decode(eager))
    assert len(seen) == 2 * DECODE_STEPS
    assert len(calls) == DECODE_STEPS - 1, "the other layer has no hook"


def test_another_weight_is_used_at_once(both):
    model, eager = both("qwen3_moe")
    for one in (model, eager):
        attention = one.model.layers[0].self_attn
        attention.q_proj.weight = torch.nn.Parameter(attention.q_proj.weight.flip(0).clone(), requires_grad=False)
        one.model.norm.weight.data = one.model.norm.weight * 2
        one.lm_head.weight.data = one.lm_head.weight.flip(0).clone()
    assert close(decode(model), decode(eager))


def test_another_dtype_is_used_at_once(packs):
    with load_smallest(packs("mixtral")) as loaded:
        model, cache = loaded.model.to(torch.bfloat16), DynamicCache()
        for tokens in ([5, 6, 7], [8], [9]):
            assert step(model, cache, tokens).dtype == torch.bfloat16


def test_another_router_weight_is_used_at_once(both):
    model, eager = both("olmoe")
    for one in (model, eager):
        router = one.model.layers[0].mlp.gate
        router.weight = torch.nn.Parameter(router.weight.flip(0).clone(), requires_grad=False)
    assert close(decode(model), decode(eager))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_cache_stays_transformers_own(family, both):
    """Steps, a prompt in between, a copy, a crop and a reordering, and more steps than there was room for."""
    model, eager = both(family)
    outputs: list[list[torch.Tensor]] = []
    for one in (model, eager):
        cache = DynamicCache(config=one.config)
        seen = [step(one, cache, list(range(3, 12))), *(step(one, cache, [20 + i]) for i in range(4))]
        twin = copy.deepcopy(cache)
        seen += [step(one, cache, [40, 41, 42]), step(one, cache, [43])]
        seen += [step(one, twin, [50]), step(one, twin, [51])]
        if family == "qwen3_moe":  # a window that is full cannot be cropped
            cache.crop(-3)
            seen.append(step(one, cache, [60]))
        cache.reorder_cache(torch.tensor([0]))
        seen += [step(one, cache, [70 + i % 40]) for i in range(SPARE_TOKENS + 3)]
        outputs.append(seen)
        assert all(layer.keys.shape[0] == 1 for layer in cache.layers)
    assert all(close(found, expected) for found, expected in zip(*outputs, strict=True))


def test_a_cache_of_another_kind_is_left_alone(both, calls):
    model, eager = both("qwen3_moe")
    calls.clear()
    outputs = []
    for one in (model, eager):
        cache = StaticCache(config=one.config, max_cache_len=64)
        outputs.append([step(one, cache, [5, 6, 7]), step(one, cache, [8])])
    assert all(close(found, expected) for found, expected in zip(*outputs, strict=True))
    assert not calls


def test_room_is_bounded(both):
    model, _ = both("gpt_oss")
    cache = DynamicCache(config=model.config)
    step(model, cache, list(range(3, 40)))
    for i in range(SPARE_TOKENS + 9):
        step(model, cache, [i + 3])
    for layer in cache.layers:
        held_tokens = layer.keys.untyped_storage().nbytes() // layer.keys[:, :, :1].nbytes
        assert held_tokens <= layer.keys.shape[2] + SPARE_TOKENS


@pytest.mark.parametrize("mode", ["fused", "eager"])
def test_an_answer_of_fused_steps_keeps_torch_to_one_thread_between_them(mode, packs, monkeypatch):
    monkeypatch.setenv("MOE_OFFLOAD_DENSE", mode)
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        with OffloadedModel.from_pretrained(packs("mixtral"), device="cpu", ram="auto") as model:
            model.model.register_forward_pre_hook(lambda module, args: seen.append(torch.get_num_threads()))
            prompt = torch.arange(PROMPT_TOKENS).unsqueeze(0)
            model._generator.replay(prompt, [1, 2, 3], lambda num_tokens: seen.append(torch.get_num_threads()))
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1 if mode == "fused" else 3}


def test_the_environment_decides(monkeypatch):
    monkeypatch.delenv("MOE_OFFLOAD_DENSE", raising=False)
    assert dense_mode() == "fused"
    monkeypatch.setenv("MOE_OFFLOAD_DENSE", "eager")
    assert dense_mode() == "eager"
    monkeypatch.setenv("MOE_OFFLOAD_DENSE", "quick")
    with pytest.raises(ConfigError, match="MOE_OFFLOAD_DENSE=quick is not known; use fused or eager"):
        dense_mode()
