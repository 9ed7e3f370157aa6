"""The attention modules of a model, one token at a time in one call.

Which modules: those of classes that are known to do what the kernel does, as the fields of the module say, and only
after the kernel has agreed with the module's own forward on random tokens.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from moe_offload.offload.decode.attention_forward import IMPLEMENTATIONS, AttentionForward, PlainMasks, kind_of
from moe_offload.offload.decode.attention_probe import agrees
from moe_offload.offload.decode.fused_forward import is_plain
from moe_offload.offload.decode.kv_room import growing_layer, room_of
from moe_offload.offload.decode.linears import compute_dtype, projection_of
from moe_offload.offload.decode.norms import fused_norm
from moe_offload.quant.step import AttentionCall, AttentionWeights

# With queries and gates in one projection.
_GATED = frozenset({"Qwen3NextAttention", "Qwen3_5MoeAttention"})
# Projections, perhaps norms of queries and keys, rotary embedding, one softmax over a cache, the output projection.
_CLASSES = _GATED | frozenset(
    {
        *("MixtralAttention", "Qwen2MoeAttention", "Qwen3MoeAttention", "OlmoeAttention", "FlexOlmoAttention"),
        *("GptOssAttention", "GraniteMoeAttention", "PhimoeAttention", "Glm4MoeAttention", "MiniMaxM2Attention"),
        *("Dots1Attention", "SolarOpenAttention"),
    }
)
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("q_norm", "k_norm")


class FusedAttention(AttentionForward):
    """The forward of an attention module."""

    def __init__(self, module: Any, call: AttentionCall, dtype: torch.dtype, masks: PlainMasks) -> None:
        super().__init__(module, (*_PROJECTIONS, *_NORMS), module.q_proj.in_features, dtype)
        self._call, self._masks = call, masks

    def __call__(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the module's own: the result, and the attention weights or None."""
        if self._may_attend(hidden_states, kwargs) and self._are_tables(position_embeddings):
            layer = growing_layer(past_key_values, self._module.layer_idx)
            if layer is not None and layer.keys.dtype is self._dtype and self._masks.hides_nothing(attention_mask):
                room = room_of(layer)
                cos, sin = position_embeddings
                out = self._call(hidden_states, cos, sin, room.keys, room.values, room.begin, room.end)
                room.append_to(layer)
                return out, None
        return self._eager(
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )

    def _are_tables(self, position_embeddings: Any) -> bool:
        return type(position_embeddings) is tuple and all(is_plain(table, self._dtype) for table in position_embeddings)


def fuse_attention(model: Any) -> None:
    """Give attention modules a `FusedAttention` where the kernel was seen to compute the same."""
    rotary = next((m for name, m in model.named_modules() if name.rpartition(".")[2] == "rotary_emb"), None)
    masks = PlainMasks()
    known: dict[Any, bool | None] = {}
    for module in model.modules():
        weights = _weights(module)
        if weights is None or rotary is None:
            continue
        kind = kind_of(module)
        if kind not in known:
            known[kind] = _tables_are_halves(module, weights, rotary)
        half_tables = known[kind]
        if half_tables is not None:
            dtype = compute_dtype(module.q_proj)
            call = AttentionCall(replace(weights, half_tables=half_tables), dtype)
            FusedAttention(module, call, dtype, masks)


def _weights(module: Any) -> AttentionWeights | None:
    """What the kernel needs of a module that is known by its class; None if some of it is not as expected."""
    if type(module).__name__ not in _CLASSES or not set(module._modules) <= {*_PROJECTIONS, *_NORMS}:
        return None
    config = module.config
    if getattr(config, "clip_qkv", None) is not None or config._attn_implementation not in IMPLEMENTATIONS:
        return None
    query, key, value, output = (projection_of(module._modules[name]) for name in _PROJECTIONS)
    norms = [fused_norm(module._modules[name]) for name in _NORMS if name in module._modules]
    if query is None or key is None or value is None or output is None or len(norms) == 1 or None in norms:
        return None
    dim = module.head_dim
    is_gated = type(module).__name__ in _GATED
    heads, kv_heads = (module._modules[name].out_features // dim for name in _PROJECTIONS[:2])
    heads //= 2 if is_gated else 1
    query_norm, key_norm = norms or (None, None)
    for norm, count in ((query_norm, heads), (key_norm, kv_heads)):
        if norm is not None and norm.weight.shape[0] not in (dim, dim * count):
            return None
    sinks = module._parameters.get("sinks")
    return AttentionWeights(
        query=query,
        key=key,
        value=value,
        output=output,
        query_norm=query_norm,
        key_norm=key_norm,
        sinks=None if sinks is None else sinks.detach(),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        scaling=module.scaling,
        half_tables=False,
        is_gated=is_gated,
    )


def _tables_are_halves(module: Any, weights: AttentionWeights, rotary: nn.Module) -> bool | None:
    """The reading of cosines and sines with which the kernel agrees with the module; None if it never does."""
    dtype = compute_dtype(module.q_proj)
    for half_tables in (False, True):
        if agrees(module, AttentionCall(replace(weights, half_tables=half_tables), dtype), half_tables, rotary, dtype):
            return half_tables
    return None
