"""Shapes of published models, by the values of their ``config.json`` on the Hugging Face hub."""

from typing import TYPE_CHECKING, Any

from moe_offload.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Only what transformers' configuration classes do not have as their default.
PRESETS: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {  # mistralai/Mixtral-8x7B-v0.1
        "model_type": "mixtral",
        "max_position_embeddings": 32768,
    },
    "qwen3-30b-a3b": {  # Qwen/Qwen3-30B-A3B
        "model_type": "qwen3_moe",
        "num_hidden_layers": 48,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "norm_topk_prob": True,
        "num_experts": 128,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    },
    "deepseek-v2-lite": {  # deepseek-ai/DeepSeek-V2-Lite
        "model_type": "deepseek_v2",
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 163840,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 1408,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
        },
    },
    "gpt-oss-20b": {  # openai/gpt-oss-20b
        "model_type": "gpt_oss",
        "num_hidden_layers": 24,
        "num_local_experts": 32,
    },
    "olmoe-1b-7b": {  # allenai/OLMoE-1B-7B-0924
        "model_type": "olmoe",
        "intermediate_size": 1024,
    },
    "mixtral-8x22b": {  # mistralai/Mixtral-8x22B-v0.1; https://mistral.ai/news/mixtral-8x22b has 141 billion weights
        "model_type": "mixtral",
        "hidden_size": 6144,
        "intermediate_size": 16384,
        "num_hidden_layers": 56,
        "num_attention_heads": 48,
        "max_position_embeddings": 65536,
    },
    # Qwen/Qwen3-235B-A22B, as https://github.com/THUDM/slime trains it (scripts/models/qwen3-235B-A22B.sh)
    "qwen3-235b-a22b": {
        "model_type": "qwen3_moe",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "norm_topk_prob": True,
        "num_experts": 128,
        "moe_intermediate_size": 1536,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    },
    "qwen3.5-35b-a3b": {"model_type": "qwen3_5_moe_text"},  # Qwen/Qwen3.5-35B-A3B: transformers' defaults
    "gpt-oss-120b": {"model_type": "gpt_oss"},  # openai/gpt-oss-120b: transformers' defaults
    "deepseek-v3": {"model_type": "deepseek_v3"},  # deepseek-ai/DeepSeek-V3 and -R1: transformers' defaults
    # moonshotai/Kimi-K2-Instruct, as https://github.com/THUDM/slime trains it (scripts/models/kimi-k2.sh)
    "kimi-k2": {
        "model_type": "deepseek_v3",
        "vocab_size": 163840,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "n_routed_experts": 384,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "max_position_embeddings": 131072,
    },
    # google/switch-c-2048, by t5x/configs/moe/models/switch_c.gin of https://github.com/google/flaxformer
    "switch-c-2048": {
        "model_type": "switch_transformers",
        "d_model": 2080,
        "d_ff": 6144,
        "num_layers": 15,
        "num_decoder_layers": 15,
        "num_sparse_encoder_layers": 15,
        "num_sparse_decoder_layers": 15,
        "num_heads": 30,
        "num_experts": 2048,
    },
}
# The format that a model is best known in; the others are published in bf16.
PUBLISHED_FORMATS = {"gpt-oss-20b": "mxfp4", "gpt-oss-120b": "mxfp4", "deepseek-v3": "fp8", "kimi-k2": "fp8"}
# Where they are from.
HUB_IDS = {
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    "deepseek-v2-lite": "deepseek-ai/DeepSeek-V2-Lite",
    "gpt-oss-20b": "openai/gpt-oss-20b",
    "olmoe-1b-7b": "allenai/OLMoE-1B-7B-0924",
    "mixtral-8x22b": "mistralai/Mixtral-8x22B-v0.1",
    "qwen3-235b-a22b": "Qwen/Qwen3-235B-A22B",
    "qwen3.5-35b-a3b": "Qwen/Qwen3.5-35B-A3B",
    "gpt-oss-120b": "openai/gpt-oss-120b",
    "deepseek-v3": "deepseek-ai/DeepSeek-V3",
    "kimi-k2": "moonshotai/Kimi-K2-Instruct",
    "switch-c-2048": "google/switch-c-2048",
}
# Published with code of their own, which is not run: they can be planned and measured by their shapes, not loaded.
CUSTOM_CODE = {"kimi-k2"}
DEFAULT_FORMAT = "nf4"
# Under which names configurations hold these numbers.
_OVERRIDES = {
    "layers": ("num_hidden_layers",),
    "experts": ("num_local_experts", "n_routed_experts", "num_experts"),
    "top_k": ("num_experts_per_tok",),
    "vocab": ("vocab_size",),
}


def preset_names() -> tuple[str, ...]:
    """What ``--like`` offers: those that answer a prompt without an encoder."""
    return tuple(name for name, values in PRESETS.items() if values["model_type"] != "switch_transformers")


def preset_config(
    name: str,
    *,
    layers: int | None = None,
    experts: int | None = None,
    top_k: int | None = None,
    vocab: int | None = None,
) -> "PreTrainedConfig":
    """The configuration of a preset, with other numbers of layers, experts, experts a token or tokens where given."""
    if name not in PRESETS:
        raise ConfigError(f"no preset {name!r}; there are: {', '.join(PRESETS)}")
    return config_like(PRESETS[name], layers=layers, experts=experts, top_k=top_k, vocab=vocab)


def config_like(
    values: dict[str, Any],
    *,
    layers: int | None = None,
    experts: int | None = None,
    top_k: int | None = None,
    vocab: int | None = None,
) -> "PreTrainedConfig":
    """The same from the values of a ``config.json``."""
    if not isinstance(values.get("model_type"), str):
        raise ConfigError("the configuration has no model_type; give a config.json as checkpoints have it")
    return _overridden(dict(values), layers=layers, experts=experts, top_k=top_k, vocab=vocab)


def _overridden(values: dict[str, Any], **numbers: int | None) -> "PreTrainedConfig":
    from transformers import AutoConfig

    model_type = values.pop("model_type")
    values.pop("quantization_config", None)
    try:
        config = AutoConfig.for_model(model_type, **values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"transformers cannot make a configuration of {model_type}: {error}") from error
    decoder = config.get_text_config(decoder=True)
    for what, number in numbers.items():
        if number is None:
            continue
        names = [name for name in _OVERRIDES[what] if getattr(decoder, name, None) is not None]
        if not names:
            raise ConfigError(f"a configuration of {model_type} has no number of {what.replace('_', '-')} to change")
        for name in names:
            setattr(decoder, name, number)
        if what == "vocab":
            _drop_special_tokens(config, number)
        if what == "layers" and getattr(decoder, "layer_types", None):
            decoder.layer_types = (list(decoder.layer_types) * number)[:number]
    _check(decoder)
    config.dtype = "bfloat16"
    return config


def _drop_special_tokens(config: Any, vocab: int) -> None:
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(getattr(config, name, None), int) and getattr(config, name) >= vocab:
            setattr(config, name, None)


def _check(decoder: Any) -> None:
    experts = next(
        (value for name in _OVERRIDES["experts"] if isinstance(value := getattr(decoder, name, None), int)), None
    )
    top_k = getattr(decoder, "num_experts_per_tok", None)
    if experts is not None and isinstance(top_k, int) and not 0 < top_k <= experts:
        raise ConfigError(f"{top_k} experts a token of {experts}: choose 1 to {experts} with --top-k or more --experts")
    dense_layers = getattr(decoder, "first_k_dense_replace", 0) or 0
    if decoder.num_hidden_layers <= dense_layers:
        raise ConfigError(
            f"{decoder.num_hidden_layers} layers, of which the first {dense_layers} have no experts; "
            f"use --layers {dense_layers + 1} or more"
        )
