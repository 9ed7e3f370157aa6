"""Expert-choice routing (Zhou et al. 2022, https://arxiv.org/abs/2202.09368): the experts choose tokens.

A token may be chosen by any number of experts, also by none; the load is even by construction. Which tokens are chosen
depends on all tokens of the call, later ones included: right for encoders and for whole texts, not for decoding token
by token.
"""

import math
from typing import Any

import torch
from torch import nn

from moe_offload.errors import ConfigError
from moe_offload.offload.experts.forwards import layer_and_expert
from moe_offload.offload.experts.layer import ExpertLayer
from moe_offload.offload.experts.pair_outputs import ExpertFn


class ExpertChoiceBlock(nn.Module):
    """A MoE block whose experts take their ``C = ceil(T * capacity_factor / E)`` best tokens each.

    ``router`` maps ``[T, H]`` to logits ``[T, E]``. The experts come from the slots of an offloaded model, by the same
    store and kernels as with any other routing. To run a layer of a loaded model so::

        experts = model.model.get_submodule(model.manifest.layers[layer_idx].module)
        block = ExpertChoiceBlock.on(experts, router, capacity_factor=2.0)
        model.model.model.layers[layer_idx].mlp = block      # wherever the family keeps its MoE block
    """

    def __init__(self, router: nn.Module, layer: ExpertLayer, expert: ExpertFn, *, capacity_factor: float) -> None:
        super().__init__()
        if not 0 < capacity_factor <= layer.num_experts:
            raise ConfigError(
                f"capacity_factor is {capacity_factor}; it is the number of experts that choose a token on average, "
                f"above 0 and at most {layer.num_experts}"
            )
        self.router = router
        self.capacity_factor = capacity_factor
        self._layer, self._expert = layer, expert

    @classmethod
    def on(cls, experts: nn.Module, router: nn.Module, *, capacity_factor: float = 2.0) -> "ExpertChoiceBlock":
        """On the experts module of a model that was loaded from a pack; `ConfigError` for a kind it cannot be."""
        return cls(router, *layer_and_expert(experts), capacity_factor=capacity_factor)

    def capacity(self, num_tokens: int) -> int:
        """How many of the tokens each expert takes."""
        return min(num_tokens, math.ceil(num_tokens * self.capacity_factor / self._layer.num_experts))

    def forward(self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None = None, **_: Any) -> torch.Tensor:
        """``[..., H]`` to ``[..., H]``; tokens of which ``token_mask [...]`` is false (padding) count for nothing.

        The sum over experts runs in their order, in fp32, whatever order their weights arrive in.
        """
        # T tokens, E experts, C capacity, H hidden
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores = self.router(tokens).float().softmax(-1)
        if token_mask is not None:
            scores = scores.masked_fill(~token_mask.reshape(-1, 1), 0.0)
        gates, chosen = scores.t().topk(self.capacity(len(tokens)), dim=-1)  # [E, C]
        outputs: dict[int, torch.Tensor] = {}

        def rows(expert_idx: int) -> torch.Tensor:
            return tokens[chosen[expert_idx]]

        num_experts = self._layer.num_experts
        self._layer.for_each_expert(
            range(num_experts), rows, self._expert, outputs.__setitem__, weights=gates.sum(-1).tolist()
        )
        combined = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
        for expert_idx in range(num_experts):
            # An expert's tokens are distinct: no two additions meet, so the result does not depend on their order.
            combined.index_add_(0, chosen[expert_idx], gates[expert_idx, :, None] * outputs[expert_idx].float())
        return combined.to(hidden_states.dtype).view(hidden_states.shape)
