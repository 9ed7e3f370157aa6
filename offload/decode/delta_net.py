"""The gated delta nets of a model, one token at a time in one call."""

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, LinearAttentionLayer

from moe_offload.offload.decode.attention_forward import ModuleStep, kind_of
from moe_offload.offload.decode.attention_probe import distance
from moe_offload.offload.decode.linears import compute_dtype, projection_of
from moe_offload.quant.delta_net import DeltaNetCall, DeltaNetWeights
from moe_offload.quant.step_weights import Norm

_CLASSES = frozenset({"Qwen3NextGatedDeltaNet", "Qwen3_5MoeGatedDeltaNet"})
_GROUPED, _SEPARATE = ("in_proj_qkvz", "in_proj_ba"), ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
_OTHERS = ("conv1d", "norm", "out_proj")
# How far results may be apart, relative to their norm; states are sums in fp32 of what is rounded before.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class FusedDeltaNet(ModuleStep):
    """The forward of a gated delta net."""

    def __init__(self, module: Any, call: DeltaNetCall) -> None:
        names = (*_GROUPED, *_SEPARATE, *_OTHERS)
        super().__init__(module, names, module.hidden_size, compute_dtype(module.out_proj))
        self._call = call

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        if (
            not args
            and kwargs.get("attention_mask") is None
            and kwargs.get("cu_seq_lens_q") is None
            and self._may_run(hidden_states)
        ):
            layer = recurrent_layer(kwargs.get("cache_params"), self._module.layer_idx, self._dtype)
            if layer is not None:
                return self._call(hidden_states, layer.conv_states[0], layer.recurrent_states[0])
        return self._eager(hidden_states, *args, **kwargs)


def recurrent_layer(cache: Any, layer_idx: int, dtype: torch.dtype) -> LinearAttentionLayer | None:
    """The cache's layer if the kernel can bring it up to date: with the states of one sequence, and no past kept."""
    if type(cache) is not DynamicCache or cache.offloading or layer_idx >= len(cache.layers):
        return None
    layer = cache.layers[layer_idx]
    if type(layer) is not LinearAttentionLayer or layer.record_past or not layer.has_previous_state[0]:
        return None
    past, state = layer.conv_states[0], layer.recurrent_states[0]
    if past is None or state is None or past.shape[0] != 1 or past.dtype != dtype or state.dtype != torch.float32:
        return None
    return layer if past.is_contiguous() and state.is_contiguous() else None


def fuse_delta_nets(model: Any) -> None:
    """Give gated delta nets a `FusedDeltaNet` where the kernel was seen to compute the same."""
    known: dict[Any, bool] = {}
    for module in model.modules():
        weights = _weights(module)
        if weights is None:
            continue
        call = DeltaNetCall(weights, compute_dtype(module.out_proj))
        kind = kind_of(module)
        if kind not in known:
            known[kind] = _agrees(module, call, weights, model.config)
        if known[kind]:
            FusedDeltaNet(module, call)


def _weights(module: Any) -> DeltaNetWeights | None:
    """What the kernel needs of a module that is known by its class; None if some of it is not as expected."""
    if type(module).__name__ not in _CLASSES:
        return None
    held = module._modules
    if set(held) not in ({*_GROUPED, *_OTHERS}, {*_SEPARATE, *_OTHERS}) or module.activation != "silu":
        return None
    dtype = compute_dtype(module.out_proj)
    convolution, norm = module.conv1d, module.norm
    if convolution.bias is not None or norm.weight.dtype != dtype or convolution.weight.dtype != dtype:
        return None
    names = [name for name in (*_GROUPED, *_SEPARATE, "out_proj") if name in held]
    projections = {}
    for name in names:
        projection = projection_of(held[name])
        if projection is None:
            return None
        projections[name] = projection
    return DeltaNetWeights(
        mixed=projections[names[0]],
        gate=projections.get("in_proj_z"),
        beta=projections["in_proj_ba" if "in_proj_ba" in held else "in_proj_b"],
        decay=projections.get("in_proj_a"),
        output=projections["out_proj"],
        norm=Norm(norm.weight.detach(), norm.variance_epsilon, rounds_first=True),
        convolution=convolution.weight.detach().squeeze(1),
        decay_bias=module.dt_bias.detach(),
        decay_log=module.A_log.detach(),
        num_key_heads=module.num_k_heads,
        num_value_heads=module.num_v_heads,
        key_dim=module.head_k_dim,
        value_dim=module.head_v_dim,
    )


@torch.no_grad()
def _agrees(module: Any, call: DeltaNetCall, weights: DeltaNetWeights, config: Any) -> bool:
    """Whether both give the same for a random token after random states, and leave the same states."""
    generator = torch.Generator().manual_seed(0)
    dtype = compute_dtype(module.out_proj)
    hidden_states = torch.randn(1, 1, module.hidden_size, generator=generator).to(dtype)
    past = torch.randn(1, *weights.convolution.shape, generator=generator).to(dtype)
    state = torch.randn(1, weights.num_value_heads, weights.key_dim, weights.value_dim, generator=generator)
    layers = []
    for _ in range(2):
        cache = DynamicCache(config=config)
        cache.update_conv_state(past, module.layer_idx)
        cache.update_recurrent_state(state, module.layer_idx)
        layers.append((cache, recurrent_layer(cache, module.layer_idx, dtype)))
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
    return all(distance(*pair) <= _TOLERANCE[dtype] for pair in pairs)
