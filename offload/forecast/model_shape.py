"""The shape of a model to forecast: of a hub model, a folder, a pack, a config.json or a preset, without weights."""

import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_offload.errors import ConfigError, SourceError
from moe_offload.offload.bench.presets import PRESETS, PUBLISHED_FORMATS, config_like, preset_config
from moe_offload.offload.checkpoint.headers import CheckpointHeaders, HeaderShards, folder_headers
from moe_offload.offload.checkpoint.hub import is_hub_id
from moe_offload.offload.checkpoint.transformers_loading import capture_skeleton
from moe_offload.offload.experts.containers import ExpertContainer, find_expert_containers
from moe_offload.offload.pack.manifest import PackManifest, is_pack, read_manifest
from moe_offload.offload.pack.outline import PackOutline, dense_targets, outline_model
from moe_offload.quant.eight_bit import fp8_format

SOURCE = "source"
_RAW_FORMATS = {torch.float32: "fp32", torch.float16: "fp16"}
_BNB_BLOCK = 64


@dataclass(frozen=True)
class ModelShape:
    """A model without weights; ``source_weights`` is the format that its checkpoint has the experts in.

    ``checkpoint_bytes`` are known from headers, else guessed from the shapes; ``fetched_bytes`` were asked of a hub.
    """

    name: str
    model: Any
    containers: Sequence[ExpertContainer]
    dense: Sequence[str]
    source_weights: str
    checkpoint_bytes: int | None = None
    is_remote: bool = False
    fetched_bytes: int = 0

    @property
    def config(self) -> Any:
        """Its configuration."""
        return self.model.config

    @property
    def is_quantized(self) -> bool:
        """Whether its checkpoint holds the experts quantised."""
        return self.source_weights not in ("bf16", "fp16", "fp32")

    @property
    def default_format(self) -> str:
        """What ``--format auto`` chooses."""
        return SOURCE if self.is_quantized else "nf4"

    @property
    def read_bytes(self) -> int:
        """What the disk will be read by: an expert at four bits."""
        return max(sum(math.prod(param.shape) for param in container.params) for container in self.containers) // 2

    @property
    def num_weights(self) -> int:
        """All weights."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def outline(self, expert_format: str, dense_format: str) -> PackOutline:
        """The pack that it would become."""
        return outline_model(
            self.model,
            self.containers,
            self.dense,
            expert_format=expert_format,
            dense_format=dense_format,
            source_format=SOURCE,
            source_weights=self.source_weights,
        )


@dataclass(frozen=True)
class PackedShape:
    """A pack that is there: its formats are what they are."""

    name: str
    folder: Path
    manifest: PackManifest
    config: Any

    @property
    def read_bytes(self) -> int:
        """What the disk will be read by: the largest expert."""
        return max(layer.slot_bytes for layer in self.manifest.layers)


def open_shape(model: str, *, revision: str | None = None, token: str | None = None) -> ModelShape | PackedShape:
    """The shape of ``model``: a pack, a checkpoint folder, a config.json, a preset's name or a hub id.

    Reads configurations and safetensors headers only; `SourceError` or `ConfigError` say what was looked for.
    """
    path = Path(os.path.expanduser(model))
    if is_pack(path):
        from moe_offload.offload.first_use import pack_config

        return PackedShape(model, path, read_manifest(path), pack_config(path))
    if path.is_dir():
        return _from_headers(model, folder_headers(path.resolve()), is_remote=False)
    if path.is_file():
        return _from_config(model, path)
    if model in PRESETS:
        return shape_of(preset_config(model), name=model, source_weights=PUBLISHED_FORMATS.get(model, "bf16"))
    if is_hub_id(model):
        from moe_offload.offload.checkpoint.hub_headers import hub_headers

        return _from_headers(model, hub_headers(model, revision=revision, token=token), is_remote=True)
    raise SourceError(
        f"{model!r} is no folder, no config.json, no hub id such as mistralai/Mixtral-8x7B-v0.1 and no preset; presets "
        f"are: {', '.join(PRESETS)}"
    )


def _from_headers(name: str, headers: CheckpointHeaders, *, is_remote: bool) -> ModelShape:
    from moe_offload.offload.pack.packer import plan_packing

    plan = plan_packing(name, headers.config_folder, HeaderShards(headers))
    settings = _values(headers.config_folder / "config.json").get("quantization_config")
    entry = headers.entry(plan.experts[0][0].first_key)
    dtype = plan.skeleton.model.dtype if entry is None else entry.dtype
    return ModelShape(
        name,
        plan.skeleton.model,
        plan.containers,
        [source.target for source in plan.dense],
        _source_weights(settings, dtype),
        headers.tensor_bytes,
        is_remote,
        headers.fetched_bytes,
    )


def _from_config(name: str, path: Path) -> ModelShape:
    values = _values(path)
    config = config_like(values)
    source_weights = _source_weights(values.get("quantization_config"), config.dtype)
    return shape_of(config, name=name, source_weights=source_weights)


def shape_of(config: Any, *, name: str = "model", source_weights: str = "bf16") -> ModelShape:
    """The shape of a configuration, whose checkpoint would have its experts in ``source_weights``."""
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    with tempfile.TemporaryDirectory() as nothing:  # where no weights are looked for
        skeleton = capture_skeleton(nothing, config, dtype)
    containers = find_expert_containers(skeleton.model)
    return ModelShape(name, skeleton.model, containers, dense_targets(skeleton.model, containers), source_weights)


def _source_weights(settings: dict[str, Any] | None, dtype: torch.dtype) -> str:
    """The format in which a pack would keep the experts' own numbers."""
    if not settings:
        return _RAW_FORMATS.get(dtype, "bf16")
    method = str(settings.get("quant_method", ""))
    if method == "mxfp4" or dtype == torch.int8:  # two four-bit codes a byte, in DeepSeek-V4's fp8 checkpoints
        return "mxfp4"
    if method in ("fp8", "mxfp8"):
        block = settings.get("weight_block_size")
        return fp8_format(*block).spec if block else "fp8"
    return f"bnb-{settings.get('bnb_4bit_quant_type', 'nf4')}-{_BNB_BLOCK}"


def _values(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not the configuration of a model")
    return values
