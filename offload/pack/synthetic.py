"""Packs of any shape with random weights, written at the speed of the disk: for benchmarks and tests of memory."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from moe_offload._version import VERSION
from moe_offload.offload.checkpoint.shard_file import DTYPE_NAMES
from moe_offload.offload.checkpoint.transformers_loading import capture_skeleton
from moe_offload.offload.dense_linears import SOURCE, dense_linear_format
from moe_offload.offload.experts.containers import ExpertContainer, find_expert_containers
from moe_offload.offload.pack.manifest import LayerLayout, PackManifest
from moe_offload.offload.pack.mixed import canonical, weight_formats
from moe_offload.offload.pack.outline import dense_targets
from moe_offload.offload.pack.writer import PackWriter
from moe_offload.offload.progress import NULL_PROGRESS, ProgressSink
from moe_offload.quant import get_format

# So many fresh random numbers fill a weight, again and again: a prime, so that no two rows begin at the same one.
_FRESH_NUMBERS = 1048573


def _random_weight(name: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Weights that keep a unit signal at about unit size: embeddings of variance one, the rest of one by fan-in.

    So a token's own embedding stays a good part of the residual stream, routers tell tokens apart in every layer, and a
    layer's router sees mostly what the one before it saw, as in trained models.
    """
    std = 1.0 if "embed" in name else shape[-1] ** -0.5
    num_weights = math.prod(shape)
    fresh = torch.randn(min(_FRESH_NUMBERS, num_weights), generator=generator).mul_(std).to(dtype)
    return fresh.repeat(-(-num_weights // len(fresh)))[:num_weights].view(shape)


def _layout(container: ExpertContainer, formats: Mapping[str, str]) -> LayerLayout:
    parts = []
    for param in container.params:
        spec = formats.get(param.part, "bf16")
        parts.append((param.part, param.packed_shape, spec, get_format(spec).nbytes(param.packed_shape)))
    return LayerLayout.of(container.name, container.num_experts, parts)


def _expert(layout: LayerLayout, generator: torch.Generator) -> torch.Tensor:
    blob = torch.zeros(layout.slot_bytes, dtype=torch.uint8)
    for part in layout.parts:
        weight = _random_weight(part.name, part.shape, torch.bfloat16, generator)
        blob[part.offset_bytes : part.offset_bytes + part.size_bytes] = get_format(part.format).quantize(weight)
    return blob


def write_synthetic_pack(
    folder: Path,
    config: PreTrainedConfig,
    *,
    format: str,
    dense_format: str = SOURCE,
    seed: int = 0,
    fingerprint: str | None = None,
    progress: ProgressSink = NULL_PROGRESS,
) -> PackManifest:
    """Write a pack for the model of ``config`` with random weights: normal, norms at one, biases at zero.

    A layer's experts are one expert, packed once, with its bytes rotated: codes stay codes, and scales stay scales
    within a factor, so that every expert computes something different and finite. Holds two experts at a time, and
    the largest dense tensor. An interrupted pack goes on where it was.
    ``fingerprint`` is kept in the manifest.
    """
    format = canonical(format)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    identity = {"source": "synthetic", "config": config.to_json_string(), "format": format, "seed": str(seed)}
    identity["dense_format"] = dense_format
    with PackWriter(folder, identity=identity) as writer:
        config_file = folder.parent / f".{folder.name}.config" / "config.json"
        config_file.parent.mkdir(exist_ok=True)
        try:
            config_file.write_text(json.dumps(config.to_dict() | {"dtype": "bfloat16"}, default=str))
            writer.copy_file(config_file)
            skeleton = capture_skeleton(str(config_file.parent), config, torch.bfloat16)
        finally:
            config_file.unlink()
            config_file.parent.rmdir()
        containers = find_expert_containers(skeleton.model)
        formats = weight_formats(containers, format)
        layouts = [_layout(*layer) for layer in zip(containers, formats, strict=True)]
        progress.start(f"writing {config.model_type}", sum(item.num_experts * item.slot_bytes for item in layouts))
        done = writer.done_layers()
        for layer_idx, layout in enumerate(layouts):
            if layer_idx in done:
                continue
            blob = _expert(layout, generator)
            with writer.layer(layer_idx, layout) as layer:
                for expert_idx in range(layout.num_experts):
                    layer.write_expert(expert_idx, _rotated(layout, blob, expert_idx).numpy().data)
                    progress.advance(layout.slot_bytes)
        if "dense-00000.safetensors" not in writer.done_dense():
            writer.dense_file("dense-00000.safetensors", _dense(skeleton.model, containers, dense_format, generator))
        progress.finish()
        return writer.finish(
            source="synthetic",
            revision=None,
            expert_format=format,
            dense_format=dense_format,
            created_by=f"moe-offload {VERSION}",
            extra={"fingerprint": fingerprint} if fingerprint else None,
        )


def _rotated(layout: LayerLayout, blob: torch.Tensor, expert_idx: int) -> torch.Tensor:
    """The expert's bytes, each weight's codes rotated by rows (its first bytes by code, whatever the format)."""
    rotated = blob.clone()
    for part in layout.parts:
        if len(part.shape) > 1:
            row_bytes = max(1, int(part.shape[1] * get_format(part.format).bits_per_weight()) // 8) // 64 * 64 or 64
            codes = blob[part.offset_bytes : part.offset_bytes + part.size_bytes // 2 // row_bytes * row_bytes]
            rotated[part.offset_bytes : part.offset_bytes + codes.numel()] = codes.roll(row_bytes * expert_idx)
    return rotated


def _dense(
    model: torch.nn.Module, containers: list[ExpertContainer], dense_format: str, generator: torch.Generator
) -> Iterator[tuple[str, str, tuple[int, ...], memoryview]]:
    state = model.state_dict()
    for name in dense_targets(model, containers):
        tensor = state[name]
        shape = tuple(tensor.shape)
        if tensor.dim() >= 2:
            value = _random_weight(name, shape, torch.bfloat16, generator)
            spec = dense_linear_format(model, name, dense_format)
            if spec is not None:
                value = get_format(spec).quantize(value)
        else:
            value = torch.zeros(shape) if "bias" in name else torch.ones(shape)
            value = value.to(torch.bfloat16 if tensor.is_floating_point() else tensor.dtype)
        yield name, DTYPE_NAMES[value.dtype], tuple(value.shape), value.reshape(-1).view(torch.uint8).numpy().data
