"""What each kind of expert container computes, with weights that come from slots.

The decorated kinds are reached through transformers' experts interface, under the name ``offload``; the others get a
forward of their own that does what theirs did. `install_expert_layer` connects one container with its layer.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_offload.errors import ConfigError
from moe_offload.offload.experts.activations import find_activation
from moe_offload.offload.experts.containers import ExpertContainer
from moe_offload.offload.experts.layer import ExpertLayer
from moe_offload.offload.experts.pair_outputs import ExpertFn
from moe_offload.offload.experts.weights import ExpertWeights, MlpParts
from moe_offload.offload.graphs.experts_op import register_experts, routed_experts

IMPLEMENTATION = "offload"
_LAYER = "_moe_offload_layer"
_HANDLE = "_moe_offload_handle"
_CALL = "_moe_offload_call"

Mlp = tuple[ExpertFn, MlpParts | None]
"""One expert's MLP as code, and what it is made of if kernels may compute it in its place."""


def _mlp_parts(
    container: ExpertContainer,
    up: tuple[str, ...],
    down: str,
    between: Callable[[torch.Tensor], torch.Tensor],
    *,
    has_gate: bool = True,
    biases: tuple[str | None, str | None] = (None, None),
) -> MlpParts | None:
    """What an MLP is made of, for the call that computes all experts; None if ``between`` is not known to kernels."""
    num_rows = sum(param.packed_shape[0] for param in container.params if param.part in up)
    activation = find_activation(container.module, between, num_rows, has_gate=has_gate)
    return None if activation is None else MlpParts(up, down, activation, *biases)


def _decorated_parts(container: ExpertContainer) -> MlpParts | None:
    module: Any = container.module
    if getattr(module, "has_post_expert_norm", False):
        return None
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    return _mlp_parts(
        container,
        (up_name,),
        "down_proj",
        module._apply_gate if module.has_gate else module.act_fn,
        has_gate=module.has_gate,
        biases=(f"{up_name}_bias", "down_proj_bias") if module.has_bias else (None, None),
    )


def decorated_mlp(module: Any) -> Callable[[ExpertWeights, torch.Tensor], torch.Tensor]:
    """The MLP of a container that transformers decorates: projections, biases, and the module's own gate and norm."""
    up_name = "gate_up_proj" if module.has_gate else "up_proj"

    def expert(weights: ExpertWeights, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden = weights.linear(up_name, hidden_states)
        if module.has_bias:
            hidden = hidden + weights.tensor(f"{up_name}_bias", hidden.dtype)
        hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
        hidden = weights.linear("down_proj", hidden)
        if module.has_bias:
            hidden = hidden + weights.tensor("down_proj_bias", hidden.dtype)
        if getattr(module, "has_post_expert_norm", False):
            hidden = module.post_expert_norm(hidden)
        return hidden

    return expert


def decorated_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """``x [T, H]``, index and final weights ``[T, K]`` to ``[T, H]``, as transformers' experts interface defines it."""
    if torch.compiler.is_compiling():
        compiled: torch.Tensor = routed_experts(hidden_states, top_k_index, top_k_weights, getattr(self, _HANDLE))
        return compiled
    layer, expert, parts = getattr(self, _LAYER)
    result: torch.Tensor = layer.routed(hidden_states, top_k_index, top_k_weights, expert, parts)
    return result


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, decorated_forward)


def _gated_mlp(container: ExpertContainer) -> Mlp:
    module: Any = container.module

    def expert(weights: ExpertWeights, hidden_states: torch.Tensor) -> torch.Tensor:
        return weights.linear("down_proj", module._apply_gate(weights.linear("gate_up_proj", hidden_states)))

    return expert, _mlp_parts(container, ("gate_up_proj",), "down_proj", module._apply_gate)


def _gated(container: ExpertContainer, layer: ExpertLayer) -> Callable[..., torch.Tensor]:
    """Step-3: as the decorated kind, without the decorator."""
    expert, parts = _gated_mlp(container)
    return lambda hidden_states, index, weights: layer.routed(hidden_states, index, weights, expert, parts)


def _longcat_mlp(container: ExpertContainer) -> Mlp:
    module: Any = container.module

    def apply_gate(hidden: torch.Tensor) -> torch.Tensor:
        gate, up = hidden.chunk(2, dim=-1)
        result: torch.Tensor = module.act_fn(gate) * up
        return result

    def expert(weights: ExpertWeights, hidden_states: torch.Tensor) -> torch.Tensor:
        return weights.linear("down_proj", apply_gate(weights.linear("gate_up_proj", hidden_states)))

    return expert, _mlp_parts(container, ("gate_up_proj",), "down_proj", apply_gate)


def _longcat(container: ExpertContainer, layer: ExpertLayer) -> Callable[..., torch.Tensor]:
    """LongCat-Flash: experts from ``num_routed_experts`` on are the identity."""
    expert, parts = _longcat_mlp(container)

    def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        routed = layer.routed(hidden_states, top_k_index, top_k_weights, expert, parts)
        identity = (top_k_weights * (top_k_index >= layer.num_experts)).sum(-1, keepdim=True)
        return (routed + hidden_states * identity).to(hidden_states.dtype)

    return forward


def _dbrx_mlp(container: ExpertContainer) -> Mlp:
    """``w2`` is held transposed in the pack."""
    module: Any = container.module

    def apply_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = module.mlp.activation_fn(gate) * up
        return result

    def expert(weights: ExpertWeights, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up = weights.linear("w1", hidden_states), weights.linear("v1", hidden_states)
        return weights.linear("w2", apply_gate(gate, up))

    return expert, _mlp_parts(container, ("w1", "v1"), "w2", lambda hidden: apply_gate(*hidden.chunk(2, dim=-1)))


def _dbrx(container: ExpertContainer, layer: ExpertLayer) -> Callable[..., torch.Tensor]:
    """DBRX: whatever the shape of its input, its experts see rows."""
    module: Any = container.module
    expert, parts = _dbrx_mlp(container)

    def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        flat = hidden_states.reshape(-1, module.hidden_size)
        routed = layer.routed(flat, top_k_index, top_k_weights, expert, parts)
        return routed.view(hidden_states.shape[0], -1, module.hidden_size)

    return forward


def _llama4_mlp(container: ExpertContainer) -> Mlp:
    module: Any = container.module

    def expert(weights: ExpertWeights, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up = weights.linear("gate_up_proj", hidden_states).chunk(2, dim=-1)
        return weights.linear("down_proj", up * module.act_fn(gate))

    return expert, None


def _llama4(container: ExpertContainer, layer: ExpertLayer) -> Callable[..., torch.Tensor]:
    """Llama 4: the input is ``[E * T, H]``, every token times its router score for every expert.

    An expert maps a zero row to zero, so only the rows with a score need it. The scores are in the rows already: the
    outputs are not weighted again.
    """
    module: Any = container.module
    expert, _ = _llama4_mlp(container)

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        rows = hidden_states.view(layer.num_experts, -1, module.hidden_size)  # [E, T, H]
        is_routed = rows.ne(0).any(-1)
        out = torch.zeros_like(rows)

        def put(expert_idx: int, output: torch.Tensor) -> None:
            out[expert_idx][is_routed[expert_idx]] = output

        touched = is_routed.any(-1).nonzero().flatten().tolist()
        layer.for_each_expert(touched, lambda expert_idx: rows[expert_idx][is_routed[expert_idx]], expert, put)
        return out.view(-1, module.hidden_size)

    return forward


def _jetmoe_mlp(container: ExpertContainer) -> Mlp:
    return lambda weights, inputs: weights.linear("weight", inputs), None


def _jetmoe(container: ExpertContainer, layer: ExpertLayer) -> Callable[..., torch.Tensor]:
    """JetMoe: rows sorted by expert, with the number of rows of each; the router's weights are applied outside."""
    module: Any = container.module
    expert, _ = _jetmoe_mlp(container)

    def forward(inputs: torch.Tensor, expert_size: list[int]) -> torch.Tensor:
        out = inputs.new_empty(inputs.shape[0], module.output_size)
        ends = [0]
        for size in expert_size:
            ends.append(ends[-1] + size)

        def rows(expert_idx: int) -> slice:
            return slice(ends[expert_idx], ends[expert_idx + 1])

        def put(expert_idx: int, output: torch.Tensor) -> None:
            out[rows(expert_idx)] = output

        touched = [expert_idx for expert_idx, size in enumerate(expert_size) if size]
        layer.for_each_expert(touched, lambda expert_idx: inputs[rows(expert_idx)], expert, put)
        return out

    return forward


def _switch_mlp(container: ExpertContainer) -> Mlp:
    module: Any = container.module
    act = module["expert_0"].act

    def expert(weights: ExpertWeights, hidden_states: torch.Tensor) -> torch.Tensor:
        return weights.linear("wo.weight", act(weights.linear("wi.weight", hidden_states)))

    return expert, _mlp_parts(container, ("wi.weight",), "wo.weight", act, has_gate=False)


def _switch(container: ExpertContainer, layer: ExpertLayer) -> Callable[..., torch.Tensor]:
    """Switch Transformers: one expert a token, none where its capacity is used up; ``selected [T, 1, E]`` one-hot."""
    expert, parts = _switch_mlp(container)

    def forward(
        hidden_states: torch.Tensor, selected_experts: torch.Tensor, routing_weights: torch.Tensor
    ) -> torch.Tensor:
        index = selected_experts.argmax(-1).masked_fill(selected_experts.sum(-1) == 0, layer.num_experts)
        return layer.routed(hidden_states, index, routing_weights, expert, parts)

    return forward


def _nllb_mlp(container: ExpertContainer) -> Mlp:
    module: Any = container.module
    act = module["expert_0"].act

    def expert(weights: ExpertWeights, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden = weights.linear("fc1.weight", hidden_states)
        hidden = act(hidden + weights.tensor("fc1.bias", hidden.dtype))
        hidden = weights.linear("fc2.weight", hidden)
        return hidden + weights.tensor("fc2.bias", hidden.dtype)

    biases = ("fc1.bias", "fc2.bias")
    return expert, _mlp_parts(container, ("fc1.weight",), "fc2.weight", act, has_gate=False, biases=biases)


def _nllb(container: ExpertContainer, layer: ExpertLayer) -> Callable[..., torch.Tensor]:
    """NLLB-MoE: GShard's top-2 with capacities, as in transformers 4; ``router_probs [T, E]`` is zero elsewhere.

    transformers 5 (5.17 to 5.23 at least) makes its one-hot ``router_mask`` one-hot again, so that only the experts
    0 and 1 ever run. Here the probabilities decide, as they did before.
    """
    module: Any = container.module
    expert, parts = _nllb_mlp(container)

    def forward(hidden_states: torch.Tensor, router_mask: torch.Tensor, router_probs: torch.Tensor) -> torch.Tensor:
        weights, index = router_probs.topk(2, dim=-1)
        index = index.masked_fill(weights <= 0, layer.num_experts)
        return layer.routed(hidden_states, index, weights * (1 - module.moe_token_dropout), expert, parts)

    return forward


_MLPS: dict[str, Callable[[ExpertContainer], Mlp]] = {
    "dbrx": _dbrx_mlp,
    "decorated": lambda container: (decorated_mlp(container.module), _decorated_parts(container)),
    "gated": _gated_mlp,
    "jetmoe": _jetmoe_mlp,
    "llama4": _llama4_mlp,
    "longcat": _longcat_mlp,
    "nllb": _nllb_mlp,
    "switch": _switch_mlp,
}

_FORWARDS: dict[str, Callable[[ExpertContainer, ExpertLayer], Callable[..., torch.Tensor]]] = {
    "dbrx": _dbrx,
    "gated": _gated,
    "jetmoe": _jetmoe,
    "llama4": _llama4,
    "longcat": _longcat,
    "nllb": _nllb,
    "switch": _switch,
}


class NotResident:
    """Stands where a container's parameter stood; says so to whoever reaches for it."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.name, self.shape, self.dtype = name, torch.Size(shape), dtype

    def __getattr__(self, attribute: str) -> Any:
        raise AttributeError(f"{self.name} is offloaded: its experts are in slots, one at a time, not in a tensor")


def strip_parameters(container: ExpertContainer) -> None:
    """Take the experts' parameters out of the model, so that a loader neither fills nor initialises them."""
    for param in container.params:
        targets = {param.target.format(expert=expert_idx) for expert_idx in range(container.num_experts)}
        for target in targets:
            path, _, leaf = target.removeprefix(container.name + ".").rpartition(".")
            owner = container.module.get_submodule(path)
            held = owner._parameters.pop(leaf, None)
            if held is not None:
                owner.__dict__[leaf] = NotResident(target, tuple(held.shape), held.dtype)
            owner._is_hf_initialized = True  # type: ignore[assignment]
    for module in container.module.modules():
        module._is_hf_initialized = True  # type: ignore[assignment]


def layer_and_expert(module: nn.Module) -> tuple[ExpertLayer, ExpertFn]:
    """The layer of a container that was installed, and one expert's MLP; `ConfigError` if it has no such thing."""
    installed: tuple[ExpertLayer, ExpertFn, MlpParts | None] | None = getattr(module, _LAYER, None)
    if installed is None:
        raise ConfigError(
            f"{type(module).__name__} is not the experts module of an offloaded model, or is of a family whose experts "
            "are not called one by one"
        )
    return installed[:2]


def expert_mlp(container: ExpertContainer) -> Mlp:
    """One expert's MLP of a container of any kind."""
    return _MLPS[container.kind](container)


def install_expert_layer(container: ExpertContainer, layer: ExpertLayer) -> None:
    """Make the container compute with ``layer``."""
    module: nn.Module = container.module
    if container.kind == "decorated":
        expert, parts = expert_mlp(container)
        call = partial(layer.routed, expert_fn=expert, parts=parts)
        object.__setattr__(module, _LAYER, (layer, expert, parts))
        object.__setattr__(module, _CALL, call)  # the handle is good for as long as this is
        object.__setattr__(module, _HANDLE, register_experts(call))
    else:
        module.forward = _FORWARDS[container.kind](container, layer)
