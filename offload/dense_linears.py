"""Dense linear layers kept packed: attention and shared experts in a format of fewer bits (``--dense-format``)."""

from typing import Any

import torch
from torch import nn

from moe_offload.quant import Format, get_format
from moe_offload.quant.blocked import BlockedFormat
from moe_offload.quant.raw import RawFormat
from moe_offload.quant.step_weights import PackedProjection, RawWeight

SOURCE = "source"
MIN_DIMENSION = 64
_KEPT_PLAIN = ("gate", "router", "classifier")


def dense_linear_format(model: nn.Module, name: str, dense_format: str) -> str | None:
    """The format of the dense parameter ``name``, or None if it stays as it is.

    Only weights of linear layers are packed; routers stay plain, and so does what is too small to matter.
    The answer follows from the model alone, so a packer and a loader agree without writing it down.
    """
    if dense_format == SOURCE or not name.endswith(".weight"):
        return None
    module_name = name.removesuffix(".weight")
    try:
        module = model.get_submodule(module_name)
    except AttributeError:
        return None
    if type(module) is not nn.Linear or module_name.rpartition(".")[2] in _KEPT_PLAIN:
        return None
    if min(module.in_features, module.out_features) < MIN_DIMENSION:
        return None
    tied = {key for keys in (getattr(model, "_tied_weights_keys", None) or {}).items() for key in keys}
    if name in tied and getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return None
    return dense_format


class PackedLinear(nn.Module):
    """A linear layer whose weight ``[out, in]`` stays packed; stands where an ``nn.Linear`` stood."""

    def __init__(self, linear: nn.Linear, spec: str, device: torch.device | str = "meta") -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.format: Format = get_format(spec)
        self.compute_dtype = linear.weight.dtype
        size_bytes = self.format.nbytes((self.out_features, self.in_features))
        self.register_buffer("packed", torch.empty(size_bytes, dtype=torch.uint8, device=device))
        self.bias = linear.bias

    @property
    def weight(self) -> torch.Tensor:
        """The dequantised weight, for modules that multiply with it themselves; a fresh tensor at every call."""
        packed: Any = self.packed
        return self.format.dequantize(packed, (self.out_features, self.in_features), self.compute_dtype)

    def projection(self) -> PackedProjection | RawWeight:
        """What kernels need to compute with the layer themselves."""
        packed: Any = self.packed
        shape = (self.out_features, self.in_features)
        bias = None if self.bias is None else self.bias.detach()
        if isinstance(self.format, BlockedFormat):
            return PackedProjection(packed, self.format.layout(shape), self.format.code, bias)
        assert isinstance(self.format, RawFormat), "a format is blocked or raw"
        return RawWeight(self.format.view(packed, shape), bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``x [..., in] @ weight.T + bias``."""
        rows = hidden_states.reshape(-1, self.in_features)
        packed: Any = self.packed
        out = self.format.linear(rows, packed, (self.out_features, self.in_features))
        if self.bias is not None:
            out = out + self.bias
        return out.view(*hidden_states.shape[:-1], self.out_features)


def replace_packed_linears(model: nn.Module, dense_format: str) -> dict[str, str]:
    """Put a `PackedLinear` wherever `dense_linear_format` says; returns packed buffer name -> parameter name."""
    renamed: dict[str, str] = {}
    for module_name, module in list(model.named_modules()):
        spec = dense_linear_format(model, f"{module_name}.weight", dense_format)
        if spec is None or not isinstance(module, nn.Linear):
            continue
        parent_name, _, child = module_name.rpartition(".")
        replacement = PackedLinear(module, spec)
        replacement._is_hf_initialized = True  # type: ignore[assignment]
        model.get_submodule(parent_name).register_module(child, replacement)
        renamed[f"{module_name}.packed"] = f"{module_name}.weight"
    return renamed
