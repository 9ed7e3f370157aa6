"""What a token costs at least: the bytes that have to be read from memory, and the operations of a prompt."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_offload.offload.dense_linears import PackedLinear
from moe_offload.offload.pack.manifest import PackManifest
from moe_offload.offload.planning.kv_cache import kv_cache_bytes
from moe_offload.offload.planning.workspace import experts_per_token


@dataclass(frozen=True)
class TokenTraffic:
    """Bytes that one decode step reads from memory, each once."""

    expert_bytes: int
    dense_bytes: int
    kv_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of them."""
        return self.expert_bytes + self.dense_bytes + self.kv_bytes


def token_traffic(model: Any, manifest: PackManifest, *, context_tokens: int) -> TokenTraffic:
    """The traffic of a step at ``context_tokens``: a token's experts packed, dense weights, keys and values."""
    return TokenTraffic(
        expert_bytes=routed_expert_bytes(manifest, model.config),
        dense_bytes=used_dense_bytes(model),
        kv_bytes=kv_cache_bytes(model.config, context_tokens=context_tokens, dtype_bytes=model.dtype.itemsize),
    )


def routed_expert_bytes(manifest: PackManifest, config: Any) -> int:
    """Packed bytes of the experts of one token in all layers."""
    top_k = experts_per_token(config.get_text_config(decoder=True))
    return sum(
        min(top_k, layer.num_experts) * sum(part.size_bytes for part in layer.parts) for layer in manifest.layers
    )


def used_dense_bytes(model: Any) -> int:
    """Bytes of all weights outside the experts, less an embedding table of which a token reads one row."""
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    for tensor in _lookup_tables(model):
        tensors.pop(id(tensor), None)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def prompt_operations(model: Any, manifest: PackManifest, tokens: int) -> int:
    """Multiplications and additions of all matrix products with weights for a prompt, of which one row gets logits.

    The products within attention are left out: they are few for prompts much shorter than the model is wide.
    """
    top_k = experts_per_token(model.config.get_text_config(decoder=True))
    expert_weights = sum(
        min(top_k, layer.num_experts) * math.prod(part.shape)
        for layer in manifest.layers
        for part in layer.parts
        if len(part.shape) > 1
    )
    head = model.get_output_embeddings()
    head_weights = 0 if head is None else _num_weights(head)
    tables = {id(tensor) for tensor in _lookup_tables(model)}
    dense_weights = sum(
        module.in_features * module.out_features for module in model.modules() if isinstance(module, PackedLinear)
    ) + sum(tensor.numel() for tensor in model.parameters() if tensor.dim() == 2 and id(tensor) not in tables)
    return int(2 * (tokens * (dense_weights - head_weights + expert_weights) + head_weights))


def _num_weights(linear: Any) -> int:
    return int(linear.in_features * linear.out_features)


def _lookup_tables(model: Any) -> list[torch.Tensor]:
    """The input embedding's tensors, unless the output layer multiplies with them."""
    table: nn.Module = model.get_input_embeddings()
    head = model.get_output_embeddings()
    shared = [] if head is None else [*head.parameters(), *head.buffers()]
    return [
        tensor for tensor in [*table.parameters(), *table.buffers()] if not any(tensor is other for other in shared)
    ]
