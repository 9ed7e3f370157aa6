"""The modules of multi-head latent attention (MLA) of a model, one token at a time in one call.

transformers caches a token's latent and its rotated key, and expands the whole past at every step. The kernel does not:
it takes the query to the latents' space and the result back from it.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicLayer

from moe_offload.offload.decode.attention_forward import IMPLEMENTATIONS, AttentionForward, PlainMasks, kind_of
from moe_offload.offload.decode.attention_probe import CACHED_TOKENS
from moe_offload.offload.decode.fused_forward import is_plain
from moe_offload.offload.decode.kv_room import growing_layer, room_of
from moe_offload.offload.decode.latent_probe import latents_agree
from moe_offload.offload.decode.linears import compute_dtype, projection_of
from moe_offload.offload.decode.norms import fused_norm
from moe_offload.quant.latent_step import LatentAttentionCall, LatentAttentionWeights, Rotary

# DeepSeek-V3's class is Kimi-K2's and Moonlight's too. With an indexer or a gate attention is another one.
_CLASSES = frozenset(
    {
        *("DeepseekV2Attention", "DeepseekV3Attention", "Glm4MoeLiteAttention", "AXK1Attention"),
        *("KimiLinearAttention", "LongcatFlashMLA"),
    }
)
_QUERY, _QUERY_DOWN = ("q_proj",), ("q_a_proj", "q_a_layernorm", "q_b_proj")
_OTHERS = ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
_NAMES = (*_QUERY, *_QUERY_DOWN, *_OTHERS)


class FusedLatentAttention(AttentionForward):
    """The forward of a module of multi-head latent attention."""

    def __init__(self, module: Any, call: LatentAttentionCall, masks: PlainMasks) -> None:
        super().__init__(module, _NAMES, module.hidden_size, compute_dtype(module.o_proj))
        self._call, self._masks, self._rotary = call, masks, call.weights.rotary

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the module's own: the result, and the attention weights or None."""
        if not args and self._may_attend(hidden_states, kwargs):
            tables = self._tables(kwargs.get("position_embeddings"))
            layer = growing_layer(kwargs.get("past_key_values"), self._module.layer_idx)
            if (
                tables is not None
                and layer is not None
                and type(layer) is DynamicLayer  # without a window
                and layer.keys.dtype is self._dtype
                and self._masks.hides_nothing(kwargs.get("attention_mask"))
            ):
                room = room_of(layer)
                out = self._call(hidden_states, *tables, room.keys, room.values, room.end)
                room.append_to(layer)
                return out, None
        return self._eager(hidden_states, *args, **kwargs)

    def _tables(self, position_embeddings: Any) -> tuple[torch.Tensor | None, torch.Tensor | None] | None:
        """Cosines and sines as the kernel takes them; None if these are others."""
        if self._rotary == Rotary.NONE:
            return None, None
        if self._rotary == Rotary.PAIRS:
            return (position_embeddings, None) if is_plain(position_embeddings, torch.complex64) else None
        if type(position_embeddings) is tuple and all(is_plain(table, self._dtype) for table in position_embeddings):
            cos, sin = position_embeddings
            return cos, sin
        return None


def fuse_latent_attention(model: Any) -> None:
    """Give modules of multi-head latent attention a `FusedLatentAttention` where the kernel was seen to agree."""
    rotary = next((m for name, m in model.named_modules() if name.rpartition(".")[2] == "rotary_emb"), None)
    masks = PlainMasks()
    known: dict[Any, Rotary | None] = {}
    for module in model.modules():
        weights = _weights(module)
        if weights is None:
            continue
        kind = kind_of(module)
        if kind not in known:
            known[kind] = _rotary_of(module, weights, rotary)
        found = known[kind]
        if found is not None:
            call = LatentAttentionCall(replace(weights, rotary=found), compute_dtype(module.o_proj))
            FusedLatentAttention(module, call, masks)


def _weights(module: Any) -> LatentAttentionWeights | None:
    """What the kernel needs of a module that is known by its class; None if some of it is not as expected."""
    if type(module).__name__ not in _CLASSES or module.config._attn_implementation not in IMPLEMENTATIONS:
        return None
    held = {name: child for name, child in module._modules.items() if child is not None}
    if set(held) not in ({*_QUERY, *_OTHERS}, {*_QUERY_DOWN, *_OTHERS}):
        return None
    projections, norms = {}, {}
    for name, child in held.items():
        if name.endswith("norm"):
            norm = fused_norm(child)
            if norm is None:
                return None
            norms[name] = norm
        else:
            projection = projection_of(child)
            if projection is None:
                return None
            projections[name] = projection
    nope_dim, rope_dim, value_dim = module.qk_nope_head_dim, module.qk_rope_head_dim, module.v_head_dim
    num_heads, rank = module.num_heads, module.kv_lora_rank
    query = "q_proj" if "q_proj" in held else "q_b_proj"
    found = [held[name].out_features for name in (query, "kv_a_proj_with_mqa", "kv_b_proj")]
    expected = [num_heads * (nope_dim + rope_dim), rank + rope_dim, num_heads * (nope_dim + value_dim)]
    if found != expected or held["o_proj"].in_features != num_heads * value_dim or rope_dim % 2:
        return None
    if norms["kv_a_layernorm"].weight.shape[0] != rank or projections["kv_b_proj"].bias is not None:
        return None
    return LatentAttentionWeights(
        query_down=projections.get("q_a_proj"),
        query_norm=norms.get("q_a_layernorm"),
        query=projections[query],
        latent=projections["kv_a_proj_with_mqa"],
        latent_norm=norms["kv_a_layernorm"],
        expand=projections["kv_b_proj"],
        output=projections["o_proj"],
        num_heads=num_heads,
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        value_dim=value_dim,
        rank=rank,
        scaling=module.scaling,
        rotary=Rotary.NONE,
        query_factor=getattr(module, "mla_scale_q_lora", 1.0),  # LongCat's
        latent_factor=getattr(module, "mla_scale_kv_lora", 1.0),
    )


def _rotary_of(module: Any, weights: LatentAttentionWeights, rotary: nn.Module | None) -> Rotary | None:
    """The way of rotating with which the kernel agrees with the module; None if it never does."""
    dtype = compute_dtype(module.o_proj)
    tables = _rotary_tables(rotary, dtype)
    for candidate in _candidates(tables, weights, dtype):
        if latents_agree(module, LatentAttentionCall(replace(weights, rotary=candidate), dtype), tables, dtype):
            return candidate
    return None


def _rotary_tables(rotary: nn.Module | None, dtype: torch.dtype) -> Any:
    """What the model's rotary embedding gives for a token after those that are cached; None without one."""
    if rotary is None:
        return None
    return rotary(torch.zeros(1, 1, 1, dtype=dtype), torch.tensor([[CACHED_TOKENS]]))


def _candidates(tables: Any, weights: LatentAttentionWeights, dtype: torch.dtype) -> tuple[Rotary, ...]:
    """The ways of rotating that such tables may stand for."""
    if tables is None:
        return (Rotary.NONE,)
    if isinstance(tables, torch.Tensor):
        fits = tables.dtype == torch.complex64 and tables.shape == (1, 1, weights.rope_dim // 2)
        return (Rotary.PAIRS,) if fits else ()
    shape = (1, 1, weights.rope_dim)
    fits = len(tables) == 2 and all(table.dtype == dtype and table.shape == shape for table in tables)
    return (Rotary.PAIRS_TO_HALVES, Rotary.HALVES) if fits else ()
