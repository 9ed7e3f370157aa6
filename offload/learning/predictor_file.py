"""A fitted predictor on the disk: one safetensors file beside the pack that it was fitted for."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from moe_offload.cache.learned import LearnedWeights
from moe_offload.cache.recall import Floats
from moe_offload.errors import ConfigError
from moe_offload.offload.pack.manifest import PackManifest

PREDICTOR_NAME = "predictor.safetensors"
PREDICTOR_VERSION = 1
MOST_WIDTH = 1024
_LAYER_ARRAYS = ("now", "before", "out", "bias")


def save_predictor(folder: Path, manifest: PackManifest, weights: LearnedWeights) -> Path:
    """Replace what was there, at once or not at all; ConfigError where the pack's folder cannot be written to."""
    tensors = {"start": weights.start}
    for layer_idx in range(len(weights.bias)):
        tensors |= {f"layers.{layer_idx}.{name}": getattr(weights, name)[layer_idx] for name in _LAYER_ARRAYS}
    metadata = {"format": "moe-offload predictor", "version": str(PREDICTOR_VERSION), "model": _model_id(manifest)}
    path = folder / PREDICTOR_NAME
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, metadata))
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written: {error}") from error
    return path


def load_predictor(folder: Path, manifest: PackManifest) -> LearnedWeights:
    """ConfigError, which names the command that makes one, where there is none that fits the pack."""
    path = folder / PREDICTOR_NAME
    remedy = f"fit one with: moe-offload learn {folder} TRACE..., from traces recorded with --trace"
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("version") != str(PREDICTOR_VERSION):
                raise ConfigError(f"{path} is of version {metadata.get('version')}, not {PREDICTOR_VERSION}; {remedy}")
            if metadata.get("model") != _model_id(manifest):
                raise ConfigError(f"{path} was fitted to a model of other layers; {remedy}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except FileNotFoundError:
        raise ConfigError(
            f"--policy learned needs a predictor of this model, and {path} is not there; {remedy}"
        ) from None
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; {remedy}") from error
    return _checked(tensors, [layer.num_experts for layer in manifest.layers], f"{path} is damaged", remedy)


def _checked(tensors: dict[str, Floats], num_experts: Sequence[int], damaged: str, remedy: str) -> LearnedWeights:
    width = tensors["start"].size if "start" in tensors else 0
    shapes: dict[str, tuple[int, ...]] = {"start": (width,)}
    for layer_idx, num in enumerate(num_experts):
        by_name = {"now": (num, width), "before": (num, width), "out": (width, num), "bias": (num,)}
        shapes |= {f"layers.{layer_idx}.{name}": shape for name, shape in by_name.items()}
    if not 0 < width <= MOST_WIDTH or tensors.keys() != shapes.keys():
        raise ConfigError(f"{damaged}: its arrays are not those of {len(num_experts)} layers; {remedy}")
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype != np.float32 or not (np.abs(tensor) < 1e6).all():
            raise ConfigError(f"{damaged}: {name} is no array of finite float32 numbers of shape {shape}; {remedy}")

    def by_layer(name: str) -> tuple[Floats, ...]:
        return tuple(tensors[f"layers.{layer_idx}.{name}"] for layer_idx in range(len(num_experts)))

    return LearnedWeights(tensors["start"], *(by_layer(name) for name in _LAYER_ARRAYS))


def _model_id(manifest: PackManifest) -> str:
    """What a predictor depends on: the layers and how many experts each has; not the format that they are held in."""
    return json.dumps([[layer.module, layer.num_experts] for layer in manifest.layers])
