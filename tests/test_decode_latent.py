"""Fused decode steps of models with multi-head latent attention against their own forwards."""

import copy
from functools import cache
from typing import Any

import pytest
import torch
from decode_runs import DECODE_STEPS, close, counted_calls, decode, fused, loaded_twice, pack_of, step
from family_runs import load_smallest
from transformers import DynamicCache

from moe_offload.offload.decode.kv_room import SPARE_TOKENS
from moe_offload.offload.decode.latent_attention import FusedLatentAttention
from moe_offload.quant import backend_name
from moe_offload.quant.latent_step import LatentAttentionCall, Rotary

pytestmark = pytest.mark.skipif(backend_name() == "torch", reason="no kernels were built")

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "mscale": 0.7,
    "mscale_all_dim": 0.7,
}
# name: family, what is special, and how it rotates
CASES: dict[str, tuple[str, dict[str, Any], Rotary]] = {
    "v2": ("deepseek_v2", {"num_hidden_layers": 2}, Rotary.PAIRS),
    "v2-lite": ("deepseek_v2", {"num_hidden_layers": 2, "q_lora_rank": None, "rope_parameters": _YARN}, Rotary.PAIRS),
    "v3": ("deepseek_v3", {"num_hidden_layers": 2, "rope_parameters": _YARN}, Rotary.PAIRS_TO_HALVES),
    "v3-halves": ("deepseek_v3", {"num_hidden_layers": 2, "rope_interleave": False}, Rotary.HALVES),
    "glm-lite": ("glm4_moe_lite", {"num_hidden_layers": 2, "v_head_dim": 12}, Rotary.PAIRS_TO_HALVES),
    "axk1": ("axk1", {"num_hidden_layers": 2}, Rotary.PAIRS_TO_HALVES),
    "longcat": ("longcat_flash", {}, Rotary.PAIRS_TO_HALVES),
}


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cache(lambda name: pack_of(CASES[name][0], tmp_path_factory.mktemp(name), **CASES[name][1]))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The position of every token that went through the kernel."""
    return counted_calls(LatentAttentionCall, monkeypatch)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_eager_model(name, both, calls):
    model, eager = both(name)
    assert not fused(eager, FusedLatentAttention)
    modules = fused(model, FusedLatentAttention)
    assert len(modules) == 2
    forward = model.get_submodule(modules[0]).forward
    assert forward._call.weights.rotary == CASES[name][2]
    calls.clear()  # what loading tried
    assert close(decode(model), decode(eager))
    assert len(calls) == 2 * (DECODE_STEPS - 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["v2-lite", "v3"])
def test_sixteen_bits_are_fused(name, dtype, packs):
    with load_smallest(packs(name), dtype=str(dtype).partition(".")[2]) as model:
        assert len(fused(model.model, FusedLatentAttention)) == 2


@pytest.mark.parametrize("dense_format", ["nf4", "int8", "nf3"])
def test_packed_weights_are_fused(dense_format, tmp_path, monkeypatch):
    """Wide enough for linear layers to be packed; against plain modules of the same packed weights."""
    wide = {"hidden_size": 64, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 16, "v_head_dim": 16}
    pack = pack_of("deepseek_v3", tmp_path, num_hidden_layers=2, **wide, dense_format=dense_format)
    with loaded_twice(monkeypatch) as load:
        model, eager = load(pack)
        attention = model.model.layers[0].self_attn
        assert all(hasattr(part, "packed") for part in (attention.q_b_proj, attention.kv_b_proj, attention.o_proj))
        assert len(fused(model, FusedLatentAttention)) == 2
        assert close(decode(model), decode(eager), tolerance=2e-3)


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
def test_whatever_is_not_one_plain_token_goes_the_old_way(options, both, calls):
    model, eager = both("v3")
    if options.get("output_attentions"):
        for one in (model, eager):
            one.set_attn_implementation("eager")
    calls.clear()
    assert close(decode(model, **options), decode(eager, **options))
    assert not calls


def test_a_hook_on_a_projection_sees_it(both, calls):
    model, eager = both("v2")
    seen = []
    calls.clear()
    for one in (model, eager):
        one.model.layers[0].self_attn.kv_b_proj.register_forward_hook(lambda _, args, out: seen.append(1) or out * 2)
    assert close(decode(model), decode(eager))
    assert len(seen) == 2 * DECODE_STEPS
    assert len(calls) == DECODE_STEPS - 1, "the other layer has no hook"


def test_another_weight_is_used_at_once(both):
    model, eager = both("v2")
    for one in (model, eager):
        attention = one.model.layers[0].self_attn
        attention.kv_b_proj.weight.data = attention.kv_b_proj.weight.flip(0).clone()
    assert close(decode(model), decode(eager))


def test_a_cache_stays_transformers_own(both):
    """Steps, a prompt in between, a copy, a crop and a reordering, and more steps than there was room for."""
    model, eager = both("v3")
    outputs: list[list[torch.Tensor]] = []
    for one in (model, eager):
        cache = DynamicCache(config=one.config)
        seen = [step(one, cache, list(range(3, 12))), *(step(one, cache, [20 + i]) for i in range(4))]
        twin = copy.deepcopy(cache)
        seen += [step(one, cache, [40, 41, 42]), step(one, cache, [43])]
        seen += [step(one, twin, [50]), step(one, twin, [51])]
        cache.crop(-3)
        seen.append(step(one, cache, [60]))
        cache.reorder_cache(torch.tensor([0]))
        seen += [step(one, cache, [70 + i % 40]) for i in range(SPARE_TOKENS + 3)]
        outputs.append(seen)
        widths = [(layer.keys.shape[:2], layer.keys.shape[3], layer.values.shape[3]) for layer in cache.layers]
        assert widths == [((1, 1), one.config.kv_lora_rank, one.config.qk_rope_head_dim)] * 2
    assert all(close(found, expected) for found, expected in zip(*outputs, strict=True))
