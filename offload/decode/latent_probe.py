"""Whether the kernel of latent attention computes what a module does: both are given the same random tokens."""

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from moe_offload.offload.decode.attention_probe import (
    CACHED_TOKENS,
    CACHED_TOLERANCE,
    SCORE_STD,
    TOLERANCE,
    distance,
    empty_cache,
)
from moe_offload.offload.decode.kv_room import growing_layer, room_of
from moe_offload.quant.latent_step import LatentAttentionCall


@torch.no_grad()
def latents_agree(module: Any, call: LatentAttentionCall, tables: Any, dtype: torch.dtype) -> bool:
    """Whether both give the same for a token with these rotary ``tables``, after one and after some."""
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(1, 1, module.hidden_size, generator=generator).to(dtype)
    return all(_agrees_after(count, module, call, hidden_states, tables, generator) for count in (1, CACHED_TOKENS))


def _agrees_after(
    count: int,
    module: Any,
    call: LatentAttentionCall,
    hidden_states: torch.Tensor,
    tables: Any,
    generator: torch.Generator,
) -> bool:
    weights, dtype = call.weights, hidden_states.dtype
    latents = torch.randn(1, 1, count, weights.rank, generator=generator)
    keys = torch.randn(1, 1, count, weights.rope_dim, generator=generator)
    # Scores are linear in what is cached.
    factor = SCORE_STD / max(_score_rms(module, call, hidden_states, latents, keys), 1e-6)
    latents, keys = (latents * factor).to(dtype), (keys * factor).to(dtype)
    caches = [empty_cache(module), empty_cache(module)]
    for cache in caches:
        cache.update(latents, keys, module.layer_idx)
    expected = module(hidden_states, position_embeddings=tables, attention_mask=None, past_key_values=caches[0])[0]
    layer = growing_layer(caches[1], module.layer_idx)
    if layer is None or type(layer) is not DynamicLayer:
        return False
    room = room_of(layer)
    cos, sin = tables if type(tables) is tuple else (tables, None)
    found = call(hidden_states, cos, sin, room.keys, room.values, room.end)
    room.append_to(layer)
    own = caches[0].layers[module.layer_idx]
    return (
        distance(expected, found) <= TOLERANCE[dtype]
        and distance(own.keys, layer.keys) <= CACHED_TOLERANCE[dtype]
        and distance(own.keys[:, :, -1], layer.keys[:, :, -1]) <= CACHED_TOLERANCE[dtype]
        and distance(own.values[:, :, -1], layer.values[:, :, -1]) <= CACHED_TOLERANCE[dtype]
    )


def _score_rms(
    module: Any, call: LatentAttentionCall, hidden_states: torch.Tensor, latents: torch.Tensor, keys: torch.Tensor
) -> float:
    """How large scores are, but for the angle of the rotated part."""
    weights, dtype = call.weights, hidden_states.dtype
    if weights.query_down is None:
        query = module.q_proj(hidden_states)
    else:
        query = module.q_b_proj(module.q_a_layernorm(module.q_a_proj(hidden_states)))
    query = query.float().view(weights.num_heads, -1) * weights.query_factor
    expanded = (
        module.kv_b_proj(latents.to(dtype)).float().view(-1, weights.num_heads, weights.nope_dim + weights.value_dim)
    )
    scores = torch.einsum("hd,thd->th", query[:, : weights.nope_dim], expanded[..., : weights.nope_dim])
    scores = scores + keys.view(-1, weights.rope_dim) @ query[:, weights.nope_dim :].T
    return float((scores * weights.scaling).pow(2).mean().sqrt())
