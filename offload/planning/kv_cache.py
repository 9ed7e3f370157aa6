"""How many bytes transformers' cache of attention keys, values and recurrent states can take.

The figures follow transformers' own cache classes (``cache_utils`` and those defined beside a model), which store MLA
compressed, keep ``sliding_window - 1`` tokens of a window layer, and hold one fixed state for a linear-attention layer.
"""

from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

_RECURRENT_DTYPE_BYTES = 4  # several models keep recurrent states in fp32 whatever they compute in
STATE_ONLY_TYPES = ("linear_attention", "conv")
_STATE_TYPES = (*STATE_ONLY_TYPES, "hybrid", "hybrid_sliding")
COMPRESSED_TYPES = ("heavily_compressed_attention", "compressed_sparse_attention")


def kv_cache_bytes(
    config: PreTrainedConfig, *, context_tokens: int, batch_size: int = 1, dtype_bytes: int, chunk_tokens: int = 1
) -> int:
    """Upper bound on the bytes of the cache once ``context_tokens`` are in it.

    ``chunk_tokens`` is the most tokens fed in one forward pass: window layers keep views that hold on to the whole of
    the last pass. An encoder-decoder is given ``context_tokens`` on each side.
    """
    return sum(
        cache_bytes_per_layer(
            config,
            context_tokens=context_tokens,
            batch_size=batch_size,
            dtype_bytes=dtype_bytes,
            chunk_tokens=chunk_tokens,
        )
    )


def cache_bytes_per_layer(
    config: PreTrainedConfig, *, context_tokens: int, batch_size: int = 1, dtype_bytes: int, chunk_tokens: int = 1
) -> list[int]:
    """The bound of ``kv_cache_bytes`` layer by layer."""
    # A decoder's own keys, then those of what it attends to in the encoder.
    sides = 2 if config.is_encoder_decoder else 1
    per_layer = []
    for layer_type, window, layer in cache_layers(config):
        window_tokens = min(context_tokens, (window or context_tokens) - 1 + chunk_tokens)
        if layer_type == "dummy":
            layer_bytes = 0
        elif layer_type in COMPRESSED_TYPES:
            values = _compressed_attention_values(layer, layer_type, context_tokens, window_tokens, chunk_tokens)
            layer_bytes = values * dtype_bytes
        else:
            kv_tokens = 0 if layer_type in STATE_ONLY_TYPES else window_tokens if window else context_tokens
            layer_bytes = sides * kv_tokens * values_per_token(layer, layer_type) * dtype_bytes
            if layer_type in _STATE_TYPES:
                conv_values, recurrent_values = _state_values(layer)
                layer_bytes += conv_values * dtype_bytes + recurrent_values * _RECURRENT_DTYPE_BYTES
        per_layer.append(batch_size * layer_bytes)
    return per_layer


def state_bytes(config: PreTrainedConfig, dtype_bytes: int) -> int:
    """Of that, what layers without keys and values hold, whatever the context: every token changes it."""
    per_layer = cache_bytes_per_layer(config, context_tokens=0, dtype_bytes=dtype_bytes)
    kinds = (layer_type for layer_type, _, _ in cache_layers(config))
    return sum(size for kind, size in zip(kinds, per_layer, strict=True) if kind in STATE_ONLY_TYPES)


def cache_layers(config: PreTrainedConfig) -> list[tuple[str, int | None, Any]]:
    """Each decoder layer's kind as transformers' cache names it, its window in tokens or None, and its own config."""
    decoder = config.get_text_config(decoder=True)
    layer_types, layer_kwargs = get_layer_types_and_kwargs(decoder)
    layers = []
    for layer_type, kwargs, layer in zip(layer_types, layer_kwargs, decoder.per_layer_config, strict=True):
        window = layer.sliding_window if layer_type in COMPRESSED_TYPES else kwargs.get("sliding_window")
        layers.append((layer_type, window, layer))
    return layers


def values_per_token(layer: Any, layer_type: str = "full_attention") -> int:
    """Numbers that one attention layer caches for one token."""
    if getattr(layer, "kv_lora_rank", None):
        indexer = layer.index_head_dim if layer_type == "indexed_attention" else 0
        return int(layer.kv_lora_rank + layer.qk_rope_head_dim + indexer)
    kv_heads, head_dim = num_kv_heads(layer), key_head_dim(layer)
    indexer = getattr(layer, "index_head_dim", 0) or 0 if layer_type == "indexed_attention" else 0
    return kv_heads * (head_dim + (getattr(layer, "v_head_dim", None) or head_dim)) + indexer


def num_attention_heads(layer: Any) -> int:
    """Query heads, under any of the names that configurations give them."""
    for name in ("num_attention_heads", "n_heads", "num_heads", "decoder_attention_heads"):
        if (heads := getattr(layer, name, None)) is not None:
            return int(heads)
    raise AttributeError(f"no number of attention heads in {type(layer).__name__}")


def num_kv_heads(layer: Any) -> int:
    """Key-value heads; as many as query heads where there is no grouping."""
    attention = getattr(layer, "attn_config", None)  # DBRX
    if attention is not None and (heads := getattr(attention, "kv_n_heads", None)) is not None:
        return int(heads)
    heads = getattr(layer, "num_key_value_heads", None)
    return num_attention_heads(layer) if heads is None else int(heads)


def key_head_dim(layer: Any) -> int:
    """Width of one head."""
    for name in ("head_dim", "d_kv", "kv_channels"):
        if (width := getattr(layer, name, None)) is not None:
            return int(width)
    hidden_size = getattr(layer, "hidden_size", None) or layer.d_model
    return int(hidden_size) // num_attention_heads(layer)


def _state_values(layer: Any) -> tuple[int, int]:
    """Numbers in the convolution state and in the recurrent state of a layer without a token axis."""
    hidden_size = layer.hidden_size
    if (kernel_tokens := getattr(layer, "conv_L_cache", None)) is not None:  # LFM2: a gated convolution alone
        return hidden_size * kernel_tokens, 0
    if (value_heads := getattr(layer, "linear_num_value_heads", None)) is not None:  # gated delta net
        key_width = layer.linear_num_key_heads * layer.linear_key_head_dim
        value_width = value_heads * layer.linear_value_head_dim
        conv_values = (2 * key_width + value_width) * layer.linear_conv_kernel_dim
        return conv_values, value_heads * layer.linear_key_head_dim * layer.linear_value_head_dim
    heads = getattr(layer, "mamba_n_heads", None) or getattr(layer, "mamba_num_heads", None)
    if heads is not None:  # Mamba 2
        width = heads * (getattr(layer, "mamba_d_head", None) or layer.mamba_head_dim)
        state_size = getattr(layer, "mamba_d_state", None) or layer.ssm_state_size
        groups = getattr(layer, "mamba_n_groups", None) or layer.n_groups
        kernel_tokens = getattr(layer, "mamba_d_conv", None) or layer.conv_kernel
        return (width + 2 * groups * state_size) * kernel_tokens, width * state_size
    if (state_size := getattr(layer, "mamba_d_state", None)) is not None:  # Mamba 1
        width = layer.mamba_expand * hidden_size
        return width * layer.mamba_d_conv, width * state_size
    # Lightning attention (MiniMax): one square of head_dim a head.
    return 0, num_attention_heads(layer) * key_head_dim(layer) ** 2


def _compressed_attention_values(
    layer: Any, layer_type: str, context_tokens: int, window_tokens: int, chunk_tokens: int
) -> int:
    """DeepSeek V4: a window in full, one entry for every ``rate`` tokens of the past, and the tokens not yet merged.

    Keys and values are the same tensor. The buffers are views that hold on to the last pass.
    """
    rate = layer.compress_rates[layer_type]
    sparse = layer_type == "compressed_sparse_attention"
    width = layer.head_dim + (layer.index_head_dim if sparse else 0)
    series = 2 if sparse else 1  # sparse layers merge overlapping windows, and so project each token twice
    buffered_tokens = min(context_tokens, chunk_tokens + rate - 1)
    window = window_tokens * layer.head_dim  # one key-value head
    merged = context_tokens // rate * width
    buffers = 2 * series * buffered_tokens * width  # projections and gates
    overlap = 2 * rate * width if sparse else 0
    return int(window + merged + buffers + overlap)
