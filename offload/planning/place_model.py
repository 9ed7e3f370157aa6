"""Places a model on several GPUs: accelerate gives them layers in order, by what each will take there."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import infer_auto_device_map, init_empty_weights
from torch import nn

from moe_offload.errors import ConfigError
from moe_offload.offload.checkpoint.transformers_loading import auto_class
from moe_offload.offload.pack.manifest import LayerLayout
from moe_offload.offload.planning.placement import Placement


def place_model(
    config: Any,
    layers: Sequence[LayerLayout],
    dense_bytes: Mapping[str, int],
    cache_bytes: Sequence[int],
    *,
    budgets_bytes: Mapping[int, int],
    overhead_bytes: int,
) -> Placement:
    """Give each device layers until the share of their experts that fits is about the same on all.

    ``dense_bytes``: by the names of the model's state dict; ``cache_bytes``: of each decoder layer; ``overhead_bytes``:
    what a device spends beside. `ConfigError` for a model that cannot be divided.
    """
    with init_empty_weights(include_buffers=True):
        model = auto_class(config).from_config(config)
    stack = _decoder_layers(model, len(cache_bytes))
    available = {index: budgets_bytes[index] - overhead_bytes for index in sorted(budgets_bytes)}
    expert_bytes = [layer.num_experts * layer.slot_bytes for layer in layers]
    elastic_bytes = sum(available.values()) - sum(dense_bytes.values()) - sum(cache_bytes)
    share = min(1.0, max(0.0, elastic_bytes / sum(expert_bytes)))
    _replace_by_sizes(model, dense_bytes)
    for layer, size_bytes in zip(layers, expert_bytes, strict=True):
        _add_size(model.get_submodule(layer.module), max(layer.slot_bytes, int(share * size_bytes)))
    for module, size_bytes in zip(model.get_submodule(stack), cache_bytes, strict=True):
        _add_size(module, size_bytes)
    device_map = _device_map(model, stack, available)
    used = {_index_of(device_map, name) for name in device_map}
    devices = tuple(index for index in available if index in used)
    dense_of_device = [0] * len(devices)
    for name, size_bytes in dense_bytes.items():
        dense_of_device[devices.index(_index_of(device_map, name))] += size_bytes
    return Placement(
        devices=devices,
        budgets_bytes=tuple(budgets_bytes[index] for index in devices),
        device_map=device_map,
        dense_bytes=tuple(dense_of_device),
        device_of_layer=tuple(devices.index(_index_of(device_map, layer.module)) for layer in layers),
        device_of_cache_layer=tuple(
            devices.index(_index_of(device_map, f"{stack}.{layer_idx}")) for layer_idx in range(len(cache_bytes))
        ),
    )


def _decoder_layers(model: Any, num_layers: int) -> str:
    """The name of the list of layers that have keys and values: beside an encoder, the decoder's."""
    decoder = model.get_decoder() if model.config.is_encoder_decoder else model
    inside = {id(module) for module in decoder.modules()}
    name: str
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and id(module) in inside:
            return name
    raise ConfigError(f"the layers of {type(model).__name__} cannot be divided among GPUs; give --vram a single amount")


def _replace_by_sizes(model: nn.Module, dense_bytes: Mapping[str, int]) -> None:
    """Let every parameter be as many bytes as it will be in memory; what is not dense, none. Tied ones stay tied."""
    sized: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        bytes_there = torch.empty(dense_bytes.get(name, 0), dtype=torch.uint8, device="meta")
        sized[id(parameter)] = nn.Parameter(bytes_there, requires_grad=False)
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                module._parameters[name] = sized[id(old)]


def _add_size(module: nn.Module, size_bytes: int) -> None:
    """Let a module take so many bytes more."""
    name = f"extra_bytes_{len(list(module.buffers()))}"
    module.register_buffer(name, torch.empty(size_bytes, dtype=torch.uint8, device="meta"))


def _device_map(model: nn.Module, stack: str, available: Mapping[int, int]) -> dict[str, int]:
    layers = list(model.get_submodule(stack).children())
    whole = {type(layer).__name__ for layer in layers} | set(getattr(model, "_no_split_modules", None) or ())
    largest_bytes = max(
        sum(tensor.numel() for tensor in _tensors(module))
        for module in model.modules()
        if type(module).__name__ in whole
    )
    # By default a device is left when the next layer no longer fits; half a layer more makes that rounding to nearest.
    max_memory = {index: size_bytes + largest_bytes // 2 for index, size_bytes in available.items()}
    first, last = next(iter(max_memory)), list(max_memory)[-1]
    max_memory[first] += largest_bytes  # what accelerate keeps free there for layers that it would offload
    max_memory[last] = 1 << 60  # the rest is refused by the plan, with numbers
    with _quiet_about_devices():
        found = infer_auto_device_map(model, max_memory, no_split_module_classes=sorted(whole))
    # What holds no weights is called before all layers, as rotary embeddings are.
    return {
        name: first if isinstance(module := _at(model, name), nn.Module) and not list(module.parameters()) else index
        for name, index in found.items()
    }


@contextmanager
def _quiet_about_devices() -> Iterator[None]:
    """Without accelerate's warning of each device that is not here: plans are made for other machines too."""
    logger = logging.getLogger("accelerate.utils.modeling")

    def is_other(record: logging.LogRecord) -> bool:
        return "is not available, available devices are" not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _at(model: Any, name: str) -> Any:
    found = model
    for part in name.split(".") if name else ():
        found = getattr(found, part)
    return found


def _index_of(device_map: Mapping[str, int], name: str) -> int:
    """The entry of the longest prefix."""
    while name not in device_map:
        if not name:
            raise ConfigError("a part of the model was placed nowhere; give --vram a single amount")
        name = name.rpartition(".")[0]
    return device_map[name]
