"""What the fast forwards of a token's mixing layers share: when one may run, and what tells modules apart."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from moe_offload.offload.decode.fused_forward import FusedForward, Memory, is_plain

# Attention functions of transformers that compute what the kernels do.
IMPLEMENTATIONS = ("sdpa", "eager")

T = TypeVar("T")


class SeenMasks(Generic[T]):
    """What was found out about the masks that the layers of a pass are given, of one kind or two: once of each."""

    def __init__(self, look: Callable[[torch.Tensor], T]) -> None:
        self._look = look
        self._seen: tuple[tuple[weakref.ref[torch.Tensor], T], ...] = ()

    def __getitem__(self, mask: torch.Tensor) -> T:
        for seen, answer in self._seen:
            if seen() is mask:
                return answer
        answer = self._look(mask)
        self._seen = (*self._seen[-1:], (weakref.ref(mask), answer))
        return answer


class PlainMasks:
    """Which masks of decode steps hide nothing."""

    def __init__(self) -> None:
        self._seen = SeenMasks(lambda mask: bool(mask.all() if mask.dtype == torch.bool else (mask == 0).all()))

    def hides_nothing(self, mask: Any) -> bool:
        """Whether a token may attend to all that is in the cache."""
        return mask is None or (isinstance(mask, torch.Tensor) and self._seen[mask])


class ModuleStep(FusedForward):
    """The forward of a module with children ``names`` that takes a token of ``width`` numbers in one call."""

    def __init__(self, module: Any, names: tuple[str, ...], width: int, dtype: torch.dtype) -> None:
        super().__init__(module)
        self._module, self._width, self._dtype = module, width, dtype
        self._parts = [(name, module._modules.get(name)) for name in names]
        self._memory = Memory(*_tensors(module))
        found = [part for _, part in self._parts if part is not None]
        self._hooks = [hooks for part in found for hooks in (part._forward_hooks, part._forward_pre_hooks)]

    def _may_run(self, hidden_states: torch.Tensor) -> bool:
        """Whether this is one plain token, and nobody wants what happens inside."""
        module = self._module
        return (
            hidden_states.numel() == self._width
            and hidden_states.dim() == 3
            and is_plain(hidden_states, self._dtype)
            and not module.training
            and not any(self._hooks)
            and all(module._modules.get(name) is part for name, part in self._parts)
            and self._memory.is_unchanged()
        )


class AttentionForward(ModuleStep):
    """The forward of an attention module."""

    def _may_attend(self, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether it may run, and nobody wants the attention weights."""
        module = self._module
        return (
            self._may_run(hidden_states)
            and not kwargs.get("output_attentions")
            and not (module._forward_hooks and module.config._attn_implementation == "eager")
        )


def kind_of(module: Any) -> Any:
    """What tells modules apart that may compute differently: their class, their own fields, and what they hold."""
    fields = {
        name: value
        for name, value in module.__dict__.items()
        if name != "layer_idx" and isinstance(value, (bool, int, float, str, type(None)))
    }
    shapes = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in module.state_dict().items()]
    return type(module), tuple(sorted(fields.items(), key=lambda item: item[0])), tuple(shapes)


def _tensors(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Every parameter and buffer of a module, as its owner and name."""
    for owner in module.modules():
        for name in (*owner._parameters, *owner._buffers):
            yield owner, name
