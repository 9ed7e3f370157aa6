"""Brings activations to the GPU that the next module is on, where a model's layers are on several."""

import threading
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn


class _Pass(threading.local):
    """What this thread's forward pass has brought where."""

    def __init__(self) -> None:
        self.moved: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}


def _called(module: nn.Module) -> list[nn.Module]:
    """What is called of a module that was placed: a list of layers is not, its layers are."""
    if isinstance(module, nn.ModuleList):
        return [called for child in module for called in _called(child)]
    return [module]


class DeviceBoundaries:
    """Looks at the arguments of the modules that were placed, which are whole layers, and of no others.

    What all layers are given, such as masks and rotary embeddings, crosses once a pass and device. Caches stay with
    their layers. Copies between devices are ordered on both devices' current streams, and no thread waits.
    """

    def __init__(self, model: Any, device_map: Mapping[str, torch.device]) -> None:
        self._pass = _Pass()
        for name, device in device_map.items():
            try:
                module = model.get_submodule(name)
            except AttributeError:  # a parameter of its own
                continue
            for called in _called(module):
                called.register_forward_pre_hook(partial(self._bring, device), with_kwargs=True)
        passes = [model]
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            passes.append(model.get_encoder())  # `generate` runs it by itself
        for module in passes:
            module.register_forward_hook(lambda *_: self._pass.moved.clear(), always_call=True)

    def _bring(
        self, device: torch.device, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(self._there(value, device) for value in args), {
            name: self._there(value, device) for name, value in kwargs.items()
        }

    def _there(self, value: Any, device: torch.device) -> Any:
        if isinstance(value, torch.Tensor):
            return value if value.device == device else self._moved(value, device)
        if type(value) in (tuple, list):
            return type(value)(self._there(each, device) for each in value)
        if type(value) is dict:
            return {key: self._there(each, device) for key, each in value.items()}
        return value

    def _moved(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        # With the tensor itself, so that no later one can have its id.
        known = self._pass.moved.get((id(tensor), device))
        if known is None:
            known = self._pass.moved[id(tensor), device] = (tensor, tensor.to(device, non_blocking=True))
        return known[1]
