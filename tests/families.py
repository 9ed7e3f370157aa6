"""A tiny random configuration of every model family the runtime must serve, for tests that build real models."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

_BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EIGHT: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_ROUTED: dict[str, Any] = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LOCAL: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 2}
_HEAD8: dict[str, Any] = {"head_dim": 8}
_DELTA_NET: dict[str, Any] = {
    "num_hidden_layers": 4,
    "shared_expert_intermediate_size": 32,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_MLA: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
_GROUPED: dict[str, Any] = {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}

# name -> (model_type, keyword arguments of its config)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {**_BASE, "num_local_experts": 8}),
    "qwen2_moe": ("qwen2_moe", {**_BASE, **_EIGHT, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": ("qwen3_moe", {**_BASE, **_EIGHT, **_HEAD8}),
    "qwen3_next": ("qwen3_next", {**_BASE, **_EIGHT, **_HEAD8, **_DELTA_NET}),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", {**_BASE, **_EIGHT, **_HEAD8, **_DELTA_NET}),
    "deepseek_v2": (
        "deepseek_v2",
        {**_BASE, **_MLA, **_ROUTED, **_GROUPED, "n_shared_experts": 1, "topk_method": "group_limited_greedy"},
    ),
    "deepseek_v3": ("deepseek_v3", {**_BASE, **_MLA, **_ROUTED, **_GROUPED, "n_shared_experts": 1}),
    "deepseek_v4": (
        "deepseek_v4",
        {**_BASE, **_ROUTED, "num_hidden_layers": 4, "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"]},
    ),
    "gpt_oss": ("gpt_oss", {**_BASE, **_LOCAL, **_HEAD8, "layer_types": None}),
    "olmoe": ("olmoe", {**_BASE, "num_experts": 8, "num_experts_per_tok": 2}),
    "granitemoe": ("granitemoe", {**_BASE, **_LOCAL}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **_BASE,
            **_LOCAL,
            "shared_intermediate_size": 32,
            "layer_types": ["attention"] * 3,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
        },
    ),
    "phimoe": ("phimoe", {**_BASE, "num_local_experts": 8}),
    "glm4_moe": ("glm4_moe", {**_BASE, **_HEAD8, **_ROUTED, **_GROUPED}),
    "minimax": ("minimax", {**_BASE, **_HEAD8, "num_local_experts": 8, "num_hidden_layers": 4, "block_size": 16}),
    "minimax_m2": ("minimax_m2", {**_BASE, **_LOCAL, **_HEAD8}),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {**_BASE, "moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 1},
    ),
    "llama4_text": ("llama4_text", {**_BASE, **_HEAD8, "num_local_experts": 4, "intermediate_size_mlp": 48}),
    "jamba": (
        "jamba",
        {
            **_BASE,
            "num_hidden_layers": 4,
            "num_experts": 4,
            "use_mamba_kernels": False,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
        },
    ),
    "lfm2_moe": (
        "lfm2_moe",
        {
            **_BASE,
            **_EIGHT,
            "num_hidden_layers": 4,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        },
    ),
    "dbrx": (
        "dbrx",
        {
            "vocab_size": 128,
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 3,
            "max_seq_len": 128,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 24, "hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2},
            "pad_token_id": 0,
        },
    ),
    "jetmoe": ("jetmoe", {**_BASE, "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "dots1": ("dots1", {**_BASE, **_HEAD8, **_ROUTED, **_GROUPED, "n_shared_experts": 1}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {**_BASE, **_HEAD8, "num_experts": 8, "moe_topk": 2}),
    "nemotron_h": (
        "nemotron_h",
        {
            **_BASE,
            **_HEAD8,
            **_ROUTED,
            "layers_block_type": ["moe", "attention", "moe"],
            "moe_shared_expert_intermediate_size": 24,
            "n_group": 1,
            "topk_group": 1,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "use_mamba_kernels": False,
        },
    ),
    "longcat_flash": (
        "longcat_flash",
        {
            **_BASE,
            **_MLA,
            "num_layers": 2,
            "n_routed_experts": 8,
            "moe_topk": 2,
            "expert_ffn_hidden_size": 24,
            "ffn_hidden_size": 48,
            "zero_expert_num": 2,
        },
    ),
    "afmoe": ("afmoe", {**_BASE, **_EIGHT, **_HEAD8, "num_dense_layers": 1, "num_shared_experts": 1}),
    "aria_text": ("aria_text", {**_BASE, "moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 1}),
    "gemma4_text": (
        "gemma4_text",
        {
            **_BASE,
            **_HEAD8,
            "enable_moe_block": True,
            "num_experts": 8,
            "top_k_experts": 2,
            "moe_intermediate_size": 24,
            "num_hidden_layers": 6,
            "vocab_size_per_layer_input": 128,
            "hidden_size_per_layer_input": 8,
        },
    ),
    "solar_open": ("solar_open", {**_BASE, **_HEAD8, **_ROUTED, "n_shared_experts": 1}),
    "exaone_moe": (
        "exaone_moe",
        {**_BASE, **_EIGHT, **_HEAD8, "num_shared_experts": 1, "n_group": 1, "topk_group": 1},
    ),
    "flex_olmo": ("flex_olmo", {**_BASE, "num_experts": 8, "num_experts_per_tok": 2}),
    "switch_transformers": (
        "switch_transformers",
        {
            "vocab_size": 128,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 4,
            "num_decoder_layers": 4,
            "num_heads": 4,
            "num_experts": 4,
            "expert_capacity": 64,
            "num_sparse_encoder_layers": 2,
            "num_sparse_decoder_layers": 2,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
        },
    ),
    "nllb_moe": (
        "nllb-moe",
        {
            "vocab_size": 128,
            "d_model": 32,
            "encoder_layers": 4,
            "decoder_layers": 4,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_experts": 4,
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 2,
            "max_position_embeddings": 128,
            "pad_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
        },
    ),
}
ENCODER_DECODERS = frozenset({"switch_transformers", "nllb_moe"})

# What the families below take of this is decided by the fields of their configurations.
_COMMON: dict[str, Any] = {
    **_BASE,
    **_EIGHT,
    **_HEAD8,
    **_MLA,
    **_GROUPED,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "n_group": 1,
    "n_shared_experts": 1,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
}
_TINY_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
# Families beyond those that must be served: model_type -> what is special.
MORE_FAMILIES: dict[str, dict[str, Any]] = {
    "axk1": {},
    "axk2": {},
    "bailing_hybrid": {"num_hidden_layers": 4, "layer_group_size": 2},
    "beam": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "cohere2_moe": {},
    "deepseek_v32": {},
    "dots3_note_text": {},
    "flint": {},
    "glm4_moe_lite": {},
    "glm_moe_dsa": {},
    "granitemoe_swa": {},
    "granitemoeshared": {},
    "hy_v3": {},
    "hy_v4": {},
    "inkling2_text": {},
    "inkling_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8},
    "kimi_linear": {
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
    "kolibri1": {},
    "laguna": {},
    "llama4": {
        "text_config": {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48},
        "vision_config": {
            **_TINY_VISION,
            "image_size": 16,
            "patch_size": 4,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
    },
    "mellum": {},
    "mimo_v2_flash": {},
    "minimax_m3_vl_text": {},
    "qwen3_vl_moe": {
        "text_config": {**_COMMON, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "depth": 1,
            "num_heads": 4,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    },
    "step3p7": {
        "text_config": {
            **_COMMON,
            "query_pre_attn_scalar": 8,
            "sliding_window": 16,
            "share_expert_dim": 24,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "swiglu_limits": [None, None, 0.5],
        },
        "vision_config": _TINY_VISION,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


def make_config(name: str, **overrides: Any) -> PreTrainedConfig:
    """A fresh configuration of one family, some of its values replaced."""
    if name in MORE_FAMILIES:
        default = AutoConfig.for_model(name)
        known = vars(default).keys() | type(default).attribute_map.keys()
        common = {key: value for key, value in _COMMON.items() if key in known}
        if "kv_lora_rank" in common:
            common["num_key_value_heads"] = 4
        return AutoConfig.for_model(name, **(common | MORE_FAMILIES[name] | overrides))
    model_type, kwargs = FAMILIES[name]
    return AutoConfig.for_model(model_type, **(kwargs | overrides))
