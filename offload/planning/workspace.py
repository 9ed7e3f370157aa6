"""How many bytes one forward pass over a piece of a prompt takes beyond the weights and the cache.

An upper estimate from shapes, checked against measured peaks, of what transformers' plain torch code materialises.
Terms that can be alive together are added, those of different moments of a layer compared.
"""

from typing import Any

from transformers import PreTrainedConfig

from moe_offload.offload.planning.kv_cache import (
    COMPRESSED_TYPES,
    STATE_ONLY_TYPES,
    cache_bytes_per_layer,
    cache_layers,
    key_head_dim,
    num_attention_heads,
    num_kv_heads,
)

_DEQUANT_TILE_BYTES = 32 * 1024**2  # what a packed linear may dequantise at once
_LARGEST_CHUNK_SHARE_BYTES = 384 * 1024**2
_CHUNK_TOKENS = (512, 256, 128, 64, 32)
_DELTA_RULE_CHUNK_TOKENS = 64


def prefill_chunk_tokens(config: PreTrainedConfig, *, context_tokens: int, dtype_bytes: int, expert_rows: int) -> int:
    """Tokens of a prompt to process at once: as many as add but modestly to the workspace of a single token.

    The choice is the model's and the context's alone: were it the budget's, so would be the last bits of the logits.
    """

    def needed_bytes(chunk_tokens: int) -> int:
        return workspace_bytes(
            config,
            chunk_tokens=chunk_tokens,
            context_tokens=context_tokens,
            dtype_bytes=dtype_bytes,
            expert_rows=expert_rows,
        )

    least_bytes = needed_bytes(1)
    for chunk_tokens in _CHUNK_TOKENS:
        if needed_bytes(chunk_tokens) - least_bytes <= _LARGEST_CHUNK_SHARE_BYTES:
            return chunk_tokens
    return _CHUNK_TOKENS[-1]


def workspace_bytes(
    config: PreTrainedConfig,
    *,
    chunk_tokens: int,
    context_tokens: int,
    dtype_bytes: int,
    expert_rows: int,
    batch_size: int = 1,
) -> int:
    """Upper estimate of the temporary bytes of a pass over ``chunk_tokens`` that ends at ``context_tokens``.

    ``expert_rows`` is the sum of the output widths of the widest expert's projections; ``batch_size``: so many texts
    of these lengths, one beside the other.
    """
    decoder = config.get_text_config(decoder=True)
    tokens = min(chunk_tokens, context_tokens)
    hidden_size = _hidden_size(decoder)
    # The residual stream in its dtype, and a norm's copies in fp32. Hyper-connections keep several streams.
    streams = getattr(decoder, "hc_mult", None) or 1
    stream_bytes = tokens * hidden_size * streams * (4 * dtype_bytes + 8)
    eager = _attends_eagerly(config)
    layers = cache_layers(config)
    attention_bytes = max(
        _state_bytes(layer, tokens, dtype_bytes)
        if layer_type in STATE_ONLY_TYPES
        else _attention_bytes(
            layer, tokens, _attended_tokens(layer_type, window, layer, tokens, context_tokens), dtype_bytes, eager
        )
        for layer_type, window, layer in layers
        if layer_type != "dummy"
    )
    # Growing a cache layer makes the new one beside the old.
    growth_bytes = max(
        cache_bytes_per_layer(config, context_tokens=context_tokens, dtype_bytes=dtype_bytes, chunk_tokens=tokens)
    )
    mask_bytes = tokens * context_tokens * 24  # as measured: its making, and the kernel's own copy
    logits_bytes = int(decoder.vocab_size) * 40  # the last token's, in fp32, and the copies and sorts of sampling
    mlp_bytes = _mlp_bytes(decoder, tokens, hidden_size, dtype_bytes, expert_rows)
    text_bytes = max(attention_bytes + growth_bytes, logits_bytes)
    return batch_size * (stream_bytes + mask_bytes) + max(
        batch_size * text_bytes, _DEQUANT_TILE_BYTES + batch_size * mlp_bytes
    )


def _mlp_bytes(decoder: Any, tokens: int, hidden_size: int, dtype_bytes: int, expert_rows: int) -> int:
    top_k = max(experts_per_token(decoder), 1)
    routed_bytes = tokens * top_k * hidden_size * 4  # every expert's output, summed in router order afterwards
    # One expert may be given every token: its input, each projection's output and the activation, in fp32 at worst.
    expert_bytes = tokens * (hidden_size * (dtype_bytes + 4) + 2 * expert_rows * 4)
    # On a GPU all pairs of a token and an expert go together: what is between their products, in the dtype of x.
    pairs_bytes = tokens * top_k * (expert_rows // 2) * dtype_bytes
    dense_width = max(
        getattr(decoder, name, None) or 0
        for name in ("intermediate_size", "intermediate_size_mlp", "shared_intermediate_size", "ffn_hidden_size")
    )
    return routed_bytes + max(expert_bytes, pairs_bytes, 4 * tokens * dense_width * dtype_bytes)


def experts_per_token(decoder: Any) -> int:
    """The router's top_k, under any of the names that configurations give it."""
    for name in ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts"):
        value = getattr(decoder, name, None)
        if isinstance(value, int):
            return value
        if isinstance(value, list) and value:  # Hunyuan gives one a layer
            return int(max(value))
    if decoder.model_type == "switch_transformers":
        return 1
    ffn = getattr(decoder, "ffn_config", None)  # DBRX
    return int(getattr(ffn, "moe_top_k", 2))


def _attended_tokens(layer_type: str, window: int | None, layer: Any, tokens: int, context_tokens: int) -> int:
    attended = min(context_tokens, window - 1 + tokens) if window else context_tokens
    if layer_type in COMPRESSED_TYPES:
        attended += context_tokens // int(layer.compress_rates[layer_type])
    return attended


def _attention_bytes(layer: Any, tokens: int, context_tokens: int, dtype_bytes: int, eager: bool) -> int:
    heads, kv_heads, head_dim = num_attention_heads(layer), num_kv_heads(layer), key_head_dim(layer)
    latent = getattr(layer, "kv_lora_rank", None)
    key_dim, value_dim = head_dim, head_dim
    if latent:
        key_dim, value_dim = layer.qk_nope_head_dim + layer.qk_rope_head_dim, layer.v_head_dim
    # Queries, keys, values, their rotated copies, and the output before and after its transposition.
    copies_bytes = tokens * (3 * heads * key_dim + 4 * kv_heads * head_dim + 2 * heads * value_dim) * dtype_bytes
    # MLA expands the whole past to full heads, then joins the rotated part; grouped key-value heads are repeated
    # where there is a mask, and the kernel packs them anew.
    past_bytes = 0
    if latent or kv_heads != heads:
        past_bytes = context_tokens * heads * 2 * (key_dim + value_dim) * dtype_bytes
    scores = heads * tokens * context_tokens
    if eager:  # scaled, masked, joined with sinks, softmax in fp32
        past_bytes += scores * (4 * dtype_bytes + 4)
    elif key_dim != value_dim:  # torch's flash kernel for the CPU wants one width; without it halves become fp32
        halves = dtype_bytes < 4
        past_bytes += scores * (16 if halves else 12)
        past_bytes += context_tokens * heads * (key_dim + value_dim) * (8 if halves else 4)
    return int(copies_bytes + past_bytes)


def _state_bytes(layer: Any, tokens: int, dtype_bytes: int) -> int:
    """Temporaries of a linear-attention layer, all fp32 in transformers' torch code; 0 for a model without any."""
    if (value_heads := getattr(layer, "linear_num_value_heads", None)) is not None:  # gated delta net
        padded = _round_up(tokens, _DELTA_RULE_CHUNK_TOKENS)
        widths = layer.linear_key_head_dim + layer.linear_value_head_dim
        return int(padded * value_heads * (11 * widths + 5 * _DELTA_RULE_CHUNK_TOKENS) * 4)
    heads = getattr(layer, "mamba_n_heads", None) or getattr(layer, "mamba_num_heads", None)
    if heads is not None:  # Mamba 2
        block = getattr(layer, "mamba_chunk_size", None) or layer.chunk_size
        state_size = getattr(layer, "mamba_d_state", None) or layer.ssm_state_size
        head_dim = getattr(layer, "mamba_d_head", None) or layer.mamba_head_dim
        return int(_round_up(tokens, block) * heads * (5 * state_size + 6 * block + 6 * head_dim) * 4)
    if (state_size := getattr(layer, "mamba_d_state", None)) is not None:  # Mamba 1
        return int(tokens * layer.mamba_expand * layer.hidden_size * (4 * state_size + 8) * 4)
    if (block := getattr(layer, "block_size", None)) is not None:  # lightning attention
        heads, head_dim = num_attention_heads(layer), key_head_dim(layer)
        return int(tokens * heads * head_dim * 8 * dtype_bytes + 3 * heads * block * block * 4)
    return 0


def _attends_eagerly(config: PreTrainedConfig) -> bool:
    """Whether attention scores are written out, for want of a fused kernel that does what the model needs."""
    if (chosen := config._attn_implementation) is not None:
        return bool(chosen == "eager")
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    )

    mapping = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if config.is_encoder_decoder else MODEL_FOR_CAUSAL_LM_MAPPING
    model_class = mapping.get(type(config), None)
    return not getattr(model_class, "_supports_sdpa", False)


def _hidden_size(decoder: Any) -> int:
    return int(getattr(decoder, "hidden_size", None) or decoder.d_model)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
