"""What a loaded model's tokens move: kept beside the figures of a run, to be checked against a forecast."""

from typing import TYPE_CHECKING, Any

from moe_offload.offload.bench.traffic import prompt_operations, used_dense_bytes
from moe_offload.offload.forecast.token_load import LayerLoad, TokenLoad
from moe_offload.offload.planning.kv_cache import kv_cache_bytes
from moe_offload.offload.planning.workspace import experts_per_token

if TYPE_CHECKING:
    from moe_offload.offload.model import OffloadedModel


def load_figures(model: "OffloadedModel", *, context_tokens: int) -> dict[str, Any]:
    """The load of a decode step with so many tokens in its past, and what a prompt costs; for JSON."""
    plan, config = model.plan, model.model.config
    top_k = experts_per_token(config.get_text_config(decoder=True))
    layers = [
        LayerLoad(
            layer.num_experts,
            min(top_k, layer.num_experts),
            sum(part.size_bytes for part in layer.parts),
            slots / layer.num_experts,
            host_slots / layer.num_experts,
        )
        for layer, slots, host_slots in zip(model.manifest.layers, plan.num_slots, plan.num_host_slots, strict=True)
    ]
    kv_bytes = kv_cache_bytes(config, context_tokens=context_tokens, dtype_bytes=model.model.dtype.itemsize)
    return TokenLoad(layers, used_dense_bytes(model.model), kv_bytes).to_dict() | {
        "model_type": config.model_type,
        "prefill_chunk_tokens": plan.prefill_chunk_tokens,
        "operations_per_token": prompt_operations(model.model, model.manifest, 1),
    }
