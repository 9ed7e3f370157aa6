"""The experts of a layer as one opaque operator, so that the dense parts can be compiled or exported around it.

``torch.ops.moe_offload.experts`` computes what the experts module does. It stands in the module's place while a graph
is traced; a compiler sees its shapes and never looks inside.
"""

import itertools
import weakref
from typing import Protocol

import torch


class Experts(Protocol):
    """What a handle stands for: ``x [T, H]``, index and weights ``[T, K]`` to ``[T, H]``."""

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor: ...


_handles = itertools.count()
_experts_of: "weakref.WeakValueDictionary[int, Experts]" = weakref.WeakValueDictionary()


def register_experts(experts: Experts) -> int:
    """A handle for ``experts``, valid for as long as the caller keeps it."""
    handle = next(_handles)
    _experts_of[handle] = experts
    return handle


@torch.library.custom_op("moe_offload::experts", mutates_args=())
def routed_experts(
    hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, handle: int
) -> torch.Tensor:
    """The experts behind ``handle``, applied to every row and summed by the router's weights."""
    return _experts_of[handle](hidden_states, top_k_index, top_k_weights)


@routed_experts.register_fake
def _(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, handle: int) -> torch.Tensor:
    return torch.empty_like(hidden_states)
