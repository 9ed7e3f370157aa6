"""The pack that a benchmark runs on: one that is there, or a synthetic one, written once and kept."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_offload.errors import ConfigError
from moe_offload.offload.bench.presets import DEFAULT_FORMAT, PUBLISHED_FORMATS, config_like, preset_config
from moe_offload.offload.home import home_dir
from moe_offload.offload.pack.manifest import is_pack
from moe_offload.offload.progress import NULL_PROGRESS, ProgressSink

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_SOURCE = "source"


@dataclass(frozen=True)
class Shape:
    """What a synthetic pack is to be like: a preset or the values of a configuration, with numbers changed."""

    like: str | Path
    layers: int | None = None
    experts: int | None = None
    top_k: int | None = None
    vocab: int | None = None
    format: str | None = None
    dense_format: str = _SOURCE

    @property
    def expert_format(self) -> str:
        """The format of the experts: the one asked for, else the one that the model is published in, else nf4."""
        return self.format or PUBLISHED_FORMATS.get(str(self.like), DEFAULT_FORMAT)

    def config(self) -> "PreTrainedConfig":
        """Its configuration; `ConfigError` if there is no such preset, or no such file."""
        numbers = {"layers": self.layers, "experts": self.experts, "top_k": self.top_k, "vocab": self.vocab}
        if isinstance(self.like, str):
            return preset_config(self.like, **numbers)
        path = self.like / "config.json" if self.like.is_dir() else self.like
        try:
            values = json.loads(path.read_text())
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be read: {error.strerror}; name a pack, a config.json or --like"
            ) from error
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} is not the configuration of a model")
        return config_like(values, **numbers)

    @property
    def name(self) -> str:
        """For people and folders: ``mixtral-8x7b-8-layers-nf4``."""
        stem = self.like if isinstance(self.like, str) else (self.like if self.like.is_dir() else self.like.parent).name
        numbers = [
            f"{number}-{what}"
            for number, what in (
                (self.layers, "layers"),
                (self.experts, "experts"),
                (self.top_k, "a-token"),
                (self.vocab, "words"),
            )
            if number is not None
        ]
        dense = [] if self.dense_format == _SOURCE else [f"dense-{self.dense_format}"]
        return "-".join([stem or "model", *numbers, self.expert_format.replace(":", "-"), *dense])


def synthetic_pack(
    shape: Shape, folder: Path | None = None, *, progress: ProgressSink = NULL_PROGRESS, seed: int = 0
) -> Path:
    """The folder of the pack in this shape, written if it is not there yet: under the cache folder, or in ``folder``.

    `ConfigError` if ``folder`` holds another pack; `DiskFullError`; an interrupted pack goes on.
    """
    from moe_offload.offload.pack.manifest import read_manifest
    from moe_offload.offload.pack.synthetic import write_synthetic_pack

    config = shape.config()
    settings = [config.to_json_string(), shape.expert_format, shape.dense_format, str(seed)]
    fingerprint = hashlib.sha256("\n".join(settings).encode()).hexdigest()[:12]
    target = folder or home_dir() / "bench" / f"{shape.name}-{fingerprint}"
    if is_pack(target):
        found = read_manifest(target).extra.get("fingerprint")
        if found != fingerprint:
            raise ConfigError(f"{target} holds another pack; choose another folder, or name it to measure it as it is")
        return target
    write_synthetic_pack(
        target,
        config,
        format=shape.expert_format,
        dense_format=shape.dense_format,
        seed=seed,
        fingerprint=fingerprint,
        progress=progress,
    )
    return target
