"""What a pack will be like, foreseen from a model's shapes: enough to plan with before anything is read."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moe_offload.offload.checkpoint.conversion import ConversionPlan
from moe_offload.offload.dense_linears import dense_linear_format
from moe_offload.offload.experts.containers import ExpertContainer
from moe_offload.offload.pack.manifest import LayerLayout
from moe_offload.offload.pack.mixed import weight_formats
from moe_offload.quant import get_format

_RAW_FORMATS = {torch.float32: "fp32", torch.float16: "fp16"}


@dataclass(frozen=True)
class PackOutline:
    """The layers of a pack to come; plain dense tensors with their numbers of weights, the others with their bytes."""

    config: Any
    layers: tuple[LayerLayout, ...]
    expert_format: str
    plain_dense: Mapping[str, int]
    other_dense: Mapping[str, int]

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense weights, the plain ones in 16 bits."""
        return self.resident_dense_bytes(2)

    @property
    def dense_names(self) -> set[str]:
        """All dense tensors."""
        return {*self.plain_dense, *self.other_dense}

    def resident_dense_bytes(self, itemsize: int, *, without: str | None = None) -> int:
        """Bytes in memory with ``itemsize`` for each plain weight; ``without``: a tensor that stays in the pack."""
        return sum(size for name, size in self.resident_sizes(itemsize).items() if name != without)

    def resident_sizes(self, itemsize: int) -> dict[str, int]:
        """The same of each tensor."""
        return {name: itemsize * count for name, count in self.plain_dense.items()} | dict(self.other_dense)


def outline_pack(plan: ConversionPlan, expert_format: str, dense_format: str, source_format: str) -> PackOutline:
    """The outline of the pack that ``plan`` would make; ``source`` weights are taken to be in the model's dtype."""
    return outline_model(
        plan.skeleton.model,
        plan.containers,
        [source.target for source in plan.dense],
        expert_format=expert_format,
        dense_format=dense_format,
        source_format=source_format,
    )


def outline_model(
    model: Any,
    containers: Sequence[ExpertContainer],
    dense_targets: Iterable[str],
    *,
    expert_format: str,
    dense_format: str,
    source_format: str,
    source_weights: str | None = None,
) -> PackOutline:
    """The same from an empty model and the names of its dense tensors.

    ``source_weights``: the format of the experts' matrices under ``source_format``, by default the model's dtype.
    """
    raw = _RAW_FORMATS.get(model.dtype, "bf16")
    layers = []
    for container, formats in zip(containers, weight_formats(containers, expert_format), strict=True):
        parts = []
        for param in container.params:
            spec = formats.get(param.part, raw)  # vectors stay as they are
            spec = (source_weights or raw) if spec == source_format else spec
            parts.append((param.part, param.packed_shape, spec, get_format(spec).nbytes(param.packed_shape)))
        layers.append(LayerLayout.of(container.name, container.num_experts, parts))
    state = model.state_dict()
    plain: dict[str, int] = {}
    other: dict[str, int] = {}
    for target in dense_targets:
        tensor = state[target]
        packed_format = dense_linear_format(model, target, dense_format)
        if packed_format is not None:
            other[target] = get_format(packed_format).nbytes(tuple(tensor.shape))
        elif tensor.is_floating_point():
            plain[target] = tensor.numel()
        else:
            other[target] = tensor.numel() * tensor.element_size()
    return PackOutline(model.config, tuple(layers), expert_format, plain, other)


def dense_targets(model: Any, containers: Sequence[ExpertContainer]) -> list[str]:
    """The dense tensors of a checkpoint of ``model``: all but the experts, each tied one once."""
    experts = {
        param.target.format(expert=expert_idx)
        for container in containers
        for param in container.params
        for expert_idx in range(container.num_experts)
    }
    tied = set(getattr(model, "_tied_weights_keys", None) or {})
    is_tied = bool(getattr(model.config, "tie_word_embeddings", False))
    return [name for name in model.state_dict() if name not in experts and not (is_tied and name in tied)]
