"""Whether the attention kernel computes what a module does: both are given the same random tokens."""

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from moe_offload.offload.decode.kv_room import growing_layer, room_of
from moe_offload.quant.step import AttentionCall

# How far results may be apart, relative to their norm: some modules round every step of a softmax, the kernel none.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# What is cached is only rounded differently.
CACHED_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Scores of about this spread make a softmax that leans on few tokens, so that a wrong one shows.
SCORE_STD = 3.0
CACHED_TOKENS = 23
# A longer window is not filled: its module would differ from one without a window in nothing that is tried here.
_LONGEST_WINDOW_TOKENS = 1024


@torch.no_grad()
def agrees(module: Any, call: AttentionCall, half_tables: bool, rotary: Any, dtype: torch.dtype) -> bool:
    """Whether ``call`` gives what ``module`` does for one token after some, and after more than a window of them."""
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(1, 1, module.q_proj.in_features, generator=generator).to(dtype)
    position = torch.tensor([[CACHED_TOKENS]])
    try:
        tables = rotary(hidden_states, position)
    except TypeError:  # of a family that has a rotary embedding for each kind of layer
        return False
    if type(tables) is not tuple or len(tables) != 2 or any(table.dtype != dtype for table in tables):
        return False
    width = tables[0].shape[-1] * (2 if half_tables else 1)
    if width > module.head_dim or width % 2:
        return False
    return all(_agrees_after(count, module, call, hidden_states, tables, generator) for count in _counts(module))


def _counts(module: Any) -> list[int]:
    window = empty_cache(module).layers[module.layer_idx]
    if isinstance(window, DynamicSlidingWindowLayer) and 2 <= window.sliding_window <= _LONGEST_WINDOW_TOKENS:
        return [1, CACHED_TOKENS, window.sliding_window + 2]
    return [1, CACHED_TOKENS]


def _agrees_after(
    count: int, module: Any, call: AttentionCall, hidden_states: torch.Tensor, tables: Any, generator: torch.Generator
) -> bool:
    weights = call.weights
    dtype = hidden_states.dtype
    shape = (1, weights.num_kv_heads, count, weights.head_dim)
    query_rms = (
        1.0 if weights.query_norm is not None else float(module.q_proj(hidden_states).float().pow(2).mean().sqrt())
    )
    key_std = SCORE_STD / max(query_rms * weights.head_dim**0.5 * abs(weights.scaling), 1e-6)
    keys = (torch.randn(shape, generator=generator) * key_std).to(dtype)
    values = torch.randn(shape, generator=generator).to(dtype)
    caches = [empty_cache(module), empty_cache(module)]
    for cache in caches:
        cache.update(keys, values, module.layer_idx)
    expected = module(hidden_states, position_embeddings=tables, attention_mask=None, past_key_values=caches[0])[0]
    layer = growing_layer(caches[1], module.layer_idx)
    if layer is None:
        return False
    room = room_of(layer)
    found = call(hidden_states, tables[0], tables[1], room.keys, room.values, room.begin, room.end)
    room.append_to(layer)
    own = caches[0].layers[module.layer_idx]
    return (
        distance(expected, found) <= TOLERANCE[dtype]
        and distance(own.keys, layer.keys) <= CACHED_TOLERANCE[dtype]
        and distance(own.keys[:, :, -1], layer.keys[:, :, -1]) <= CACHED_TOLERANCE[dtype]
        and distance(own.values[:, :, -1], layer.values[:, :, -1]) <= CACHED_TOLERANCE[dtype]
    )


def empty_cache(module: Any) -> DynamicCache:
    """A cache as generation makes it for the module's model."""
    return DynamicCache(config=module.config)


def distance(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Norm of the difference over the norm; infinite for another shape."""
    if expected.shape != found.shape:
        return float("inf")
    return float((expected.float() - found.float()).norm() / expected.float().norm().clamp_min(1e-20))
