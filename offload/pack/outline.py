"""What a pack will be like, foreseen from a model's shapes: enough to plan with before anything is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moe_offload.offload.checkpoint.conversion import ConversionPlan
from moe_offload.offload.dense_linears import dense_linear_format
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
        num_plain = sum(count for name, count in self.plain_dense.items() if name != without)
        return itemsize * num_plain + sum(self.other_dense.values())


def outline_pack(plan: ConversionPlan, expert_format: str, dense_format: str, source_format: str) -> PackOutline:
    """The outline of the pack that ``plan`` would make; ``source`` weights are taken to be in the model's dtype."""
    model = plan.skeleton.model
    raw = _RAW_FORMATS.get(model.dtype, "bf16")
    layers = []
    for container, formats in zip(plan.containers, weight_formats(plan.containers, expert_format), strict=True):
        parts = []
        for param in container.params:
            spec = formats.get(param.part, source_format)
            spec = raw if spec == source_format else spec
            parts.append((param.part, param.packed_shape, spec, get_format(spec).nbytes(param.packed_shape)))
        layers.append(LayerLayout.of(container.name, container.num_experts, parts))
    state = model.state_dict()
    plain: dict[str, int] = {}
    other: dict[str, int] = {}
    for source in plan.dense:
        tensor = state[source.target]
        packed_format = dense_linear_format(model, source.target, dense_format)
        if packed_format is not None:
            other[source.target] = get_format(packed_format).nbytes(tuple(tensor.shape))
        elif tensor.is_floating_point():
            plain[source.target] = tensor.numel()
        else:
            other[source.target] = tensor.numel() * tensor.element_size()
    return PackOutline(model.config, tuple(layers), expert_format, plain, other)
