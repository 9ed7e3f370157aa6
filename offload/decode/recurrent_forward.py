"""What the fast forwards of layers with a state in the cache share: when one may run, and how they are tried."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, LinearAttentionLayer

from moe_offload.offload.decode.attention_forward import ModuleStep, kind_of
from moe_offload.offload.decode.attention_probe import distance
from moe_offload.quant.recurrent_step import RecurrentStep

# How far results may be apart, relative to their norm.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class StateShapes:
    """What the cache keeps of one sequence: the convolution's last tokens in ``dtype``, and a state in fp32."""

    past: torch.Size
    state: torch.Size
    dtype: torch.dtype


class RecurrentForward(ModuleStep):
    """The forward of a layer with children ``names`` that keeps a state in the cache."""

    def __init__(self, module: Any, names: tuple[str, ...], call: RecurrentStep, shapes: StateShapes) -> None:
        super().__init__(module, names, module.hidden_size, shapes.dtype)
        self._call, self._shapes = call, shapes

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        if (
            not args
            and kwargs.get("attention_mask") is None
            and kwargs.get("cu_seq_lens_q") is None
            and self._may_run(hidden_states)
        ):
            layer = _layer_of(kwargs.get("cache_params"), self._module.layer_idx, self._shapes)
            if layer is not None:
                return self._call(hidden_states, layer.conv_states[0], layer.recurrent_states[0])
        return self._eager(hidden_states, *args, **kwargs)


def fuse_recurrent(
    model: Any,
    prepare: Callable[[Any], tuple[RecurrentStep, StateShapes] | None],
    forward: type[RecurrentForward],
    names: Iterable[str],
) -> None:
    """Give modules that ``prepare`` knows a ``forward`` where the kernel was seen to compute the same."""
    known: dict[Any, bool] = {}
    for module in model.modules():
        prepared = prepare(module)
        if prepared is None:
            continue
        kind = kind_of(module)
        if kind not in known:
            known[kind] = _agrees(module, *prepared, model.config)
        if known[kind]:
            forward(module, tuple(names), *prepared)


def _layer_of(cache: Any, layer_idx: int, shapes: StateShapes) -> LinearAttentionLayer | None:
    """The cache's layer if the kernel can bring it up to date: with states of these shapes, and no past kept."""
    if type(cache) is not DynamicCache or cache.offloading or layer_idx >= len(cache.layers):
        return None
    layer = cache.layers[layer_idx]
    if type(layer) is not LinearAttentionLayer or layer.record_past or not layer.has_previous_state[0]:
        return None
    past, state = layer.conv_states[0], layer.recurrent_states[0]
    if past is None or state is None or past.shape != shapes.past or state.shape != shapes.state:
        return None
    if past.dtype != shapes.dtype or state.dtype != torch.float32:
        return None
    return layer if past.is_contiguous() and state.is_contiguous() else None


@torch.no_grad()
def _agrees(module: Any, call: RecurrentStep, shapes: StateShapes, config: Any) -> bool:
    """Whether both give the same for a random token after random states, and leave the same states."""
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(1, 1, module.hidden_size, generator=generator).to(shapes.dtype)
    past = torch.randn(shapes.past, generator=generator).to(shapes.dtype)
    state = torch.randn(shapes.state, generator=generator)
    layers = []
    for _ in range(2):
        cache = DynamicCache(config=config)
        cache.update_conv_state(past, module.layer_idx)
        cache.update_recurrent_state(state, module.layer_idx)
        layers.append((cache, _layer_of(cache, module.layer_idx, shapes)))
    (cache, own), (_, layer) = layers
    if own is None or layer is None:
        return False
    expected = module(hidden_states, cache_params=cache, attention_mask=None)
    found = call(hidden_states, layer.conv_states[0], layer.recurrent_states[0])
    pairs = (
        (expected, found),
        (own.conv_states[0], layer.conv_states[0]),
        (own.conv_states[0][..., -1], layer.conv_states[0][..., -1]),
        (own.recurrent_states[0], layer.recurrent_states[0]),
    )
    return all(distance(*pair) <= _TOLERANCE[shapes.dtype] for pair in pairs)
