"""Makes a loaded model follow a given routing while it decodes, and its lookahead foresee a given part of it.

The model's routers still run, and their weights stay, by rank; only whose output they weigh is another. What a router
would choose for a layer says nothing about a forced routing, so lookahead is told: of a layer's experts it names each
with probability ``recall ** layers ahead``, and a wrong one in place of every other. So its misses cost what they cost.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from moe_offload.errors import ConfigError
from moe_offload.offload.bench.routing import Routing
from moe_offload.offload.pass_inputs import pass_tokens

_DEEPEST = 4  # layers ahead that lookahead may ask for


class ForcedRouting:
    """Steps of one token take the routing's tokens one after the other; everything longer is left alone."""

    def __init__(
        self, model: Any, modules: Sequence[str], num_experts: int, routing: Routing, *, recall: float, seed: int
    ) -> None:
        """``modules``: the names of the expert containers in layer order. Hooks stay as long as the model."""
        device = next(model.parameters()).device
        # Where the model is, and looked up there: a step that runs from recordings follows too.
        self._index = torch.from_numpy(routing.experts).to(device)  # [tokens, layers, K]
        self._weights = None if routing.probs is None else torch.from_numpy(routing.probs).to(device)
        self._here = torch.zeros(1, dtype=torch.int64, device=device)
        self._guesses = _guesses(routing.experts, num_experts, recall, seed)
        self._token = -1
        model.register_forward_pre_hook(self._next_token, with_kwargs=True)
        for layer_idx, name in enumerate(modules):
            model.get_submodule(name).register_forward_pre_hook(self._forced(layer_idx))

    def guess(self, layer_idx: int, target_idx: int) -> list[int]:
        """The experts that lookahead is to name at a layer for one that is still to come."""
        ahead = min(target_idx - layer_idx, _DEEPEST)
        guess: list[int] = self._guesses[ahead - 1, self._token, target_idx].tolist()
        return guess

    def _next_token(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = pass_tokens(args, kwargs)
        if tokens is not None and tokens.shape[:2].numel() == 1:
            self._token = (self._token + 1) % len(self._index)
            self._here.fill_(self._token)

    def _forced(self, layer_idx: int) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            hidden_states, index, weights = _arguments(module, args)
            if index.shape[0] != 1:
                return None
            forced = self._index[:, layer_idx].index_select(0, self._here)
            if self._weights is not None:
                given = self._weights[:, layer_idx].index_select(0, self._here)
                weights = (given / given.sum() * weights.sum()).to(weights.dtype)
            return hidden_states, forced.to(index.dtype), weights

        return before


def _arguments(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    if len(args) == 3 and isinstance(args[1], torch.Tensor) and not args[1].is_floating_point():
        return args[0], args[1], args[2]
    raise ConfigError(
        f"the routing of {type(module).__name__} cannot be forced: it is not given indices of experts; "
        "use --routing model"
    )


def _guesses(experts: Any, num_experts: int, recall: float, seed: int) -> Any:
    """``[layers ahead, tokens, layers, K]``: each row right in a share of its places, wrong in the others."""
    rng = np.random.default_rng(seed)
    guesses = np.broadcast_to(experts, (_DEEPEST, *experts.shape)).copy()
    for ahead in range(_DEEPEST):
        missed = rng.random(experts.shape) >= recall ** (ahead + 1)
        for token, layer_idx, rank in np.argwhere(missed):
            others = np.setdiff1d(np.arange(num_experts), experts[token, layer_idx])
            if len(others):
                guesses[ahead, token, layer_idx, rank] = rng.choice(others)
    return guesses
