"""Attention of a prompt by the kernels, where transformers would call torch's ``scaled_dot_product_attention``.

transformers looks its attention function up by name, for all models of a process: the one registered here looks whether
a model of ours asks, and whether the kernel can do what is asked; everything else goes to the function that was there.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moe_offload.offload.decode.attention_forward import SeenMasks
from moe_offload.offload.decode.fused_forward import MAX_ROWS
from moe_offload.quant.prompt_attention import attend_prompt, attends_prompts

_NAME = "sdpa"
# What its function may be told beside a mask, and the kernel does not know.
_UNKNOWN = ("position_bias", "softcap", "cache", "s_aux", "output_attentions")

AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
Spans = tuple[torch.Tensor, torch.Tensor]
"""For each query the first key that it attends to, and the one behind its last: int32 ``[tokens]`` each."""

_modules: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()  # those of our models


def fuse_prompt_attention(model: nn.Module) -> None:
    """Let the kernels attend to the prompts of this model, where they can."""
    if not isinstance(ALL_ATTENTION_FUNCTIONS[_NAME], _PromptAttention):
        AttentionInterface.register(_NAME, _PromptAttention(ALL_ATTENTION_FUNCTIONS[_NAME]))
    _modules.update(module for module in model.modules() if "Attention" in type(module).__name__)


class _PromptAttention:
    """An attention function of transformers."""

    def __init__(self, other: AttentionFunction) -> None:
        self._other = other
        self._seen = SeenMasks(_spans_of)

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``query [B, heads, T, dim]``, ``key`` and ``value [B, kv heads, S, dim]`` to ``[B, T, heads, dim]``."""
        if (
            query.shape[2] > MAX_ROWS
            and module in _modules
            and not dropout
            and not (torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)))
            and all(kwargs.get(name) is None or kwargs[name] is False for name in _UNKNOWN)
            and attends_prompts(query, key, value)
        ):
            causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
            spans = self._spans(query.shape[2], key.shape[2], attention_mask, causal)
            if spans is not None:
                return attend_prompt(query, key, value, *spans, scaling or query.shape[3] ** -0.5), None
        return self._other(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )

    def _spans(self, num_queries: int, num_keys: int, mask: torch.Tensor | None, causal: bool) -> Spans | None:
        """None where what a query attends to has gaps, or where a mask does more than to hide."""
        if mask is None:
            end = torch.arange(1, num_queries + 1, dtype=torch.int32)
            fits = num_queries <= num_keys
            return (torch.zeros_like(end), end if causal else torch.full_like(end, num_keys)) if fits else None
        return self._seen[mask] if mask.shape == (1, 1, num_queries, num_keys) else None


def _spans_of(mask: torch.Tensor) -> Spans | None:
    if mask.dtype != torch.bool:
        return None
    shown = mask[0, 0].byte()
    count = shown.sum(-1, dtype=torch.int32)
    begin = shown.argmax(-1).int()  # the first of the largest
    end = shown.shape[-1] - shown.flip(-1).argmax(-1).int()
    return (begin, end) if bool(((count > 0) & (end - begin == count)).all()) else None
