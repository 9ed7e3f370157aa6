"""Where a model comes from: a folder, or a hub id."""

import json
import os
from pathlib import Path
from typing import Protocol

import xxhash

from moe_offload.errors import SourceError
from moe_offload.offload.checkpoint.hub import HubShards, fetch_small_files, is_hub_id
from moe_offload.offload.checkpoint.shards import INDEX_FILE, PICKLE_SUFFIXES, FolderShards, ShardSource
from moe_offload.offload.pack.manifest import is_pack

WEIGHT_SUFFIXES = (*PICKLE_SUFFIXES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx")


class CheckpointSource(Protocol):
    """A checkpoint and all that is known of it without its weights."""

    @property
    def name(self) -> str:
        """The hub id, or the folder's path."""

    @property
    def revision(self) -> str | None:
        """The hub's commit, or None."""

    @property
    def fingerprint(self) -> str:
        """Changes when the checkpoint does."""

    @property
    def config_folder(self) -> Path:
        """A folder with the config and the tokenizer."""

    @property
    def shards(self) -> ShardSource:
        """The weights; for the caller to close."""

    @property
    def is_quantized(self) -> bool:
        """Whether the config names a quantisation."""

    def small_files(self) -> list[Path]:
        """What a pack copies: config, tokenizer, generation config, chat template."""


def _is_quantized(config_folder: Path) -> bool:
    try:
        return bool(json.loads((config_folder / "config.json").read_text()).get("quantization_config"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{config_folder} holds no readable config.json: {error}") from error


def _small_files(folder: Path) -> list[Path]:
    """Files of a checkpoint folder that are no weights and no code."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and path.name != INDEX_FILE
        and path.suffix not in (*WEIGHT_SUFFIXES, ".py", ".md")
        and not path.name.startswith(".")
        and not path.name.endswith(".index.json")
    )


class FolderSource:
    """A checkpoint in a folder."""

    revision = None

    def __init__(self, folder: Path) -> None:
        self.config_folder = folder.resolve()
        self.name = str(self.config_folder)
        self.is_quantized = _is_quantized(self.config_folder)
        self.shards: ShardSource = FolderShards(self.config_folder)

    @property
    def fingerprint(self) -> str:
        """Of the names, sizes and times of the weights, and of the config."""
        digest = xxhash.xxh3_64((self.config_folder / "config.json").read_bytes())
        digest.update(self.name.encode())
        for path in sorted(self.config_folder.glob("*.safetensors")):
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
        return digest.hexdigest()

    def small_files(self) -> list[Path]:
        """What a pack copies."""
        return _small_files(self.config_folder)


class HubSource:
    """A checkpoint on a hub, of which only the small files are here."""

    def __init__(self, name: str, revision: str | None, token: str | None) -> None:
        self.name = name
        self.config_folder, self.revision = fetch_small_files(name, revision=revision, token=token)
        self.is_quantized = _is_quantized(self.config_folder)
        self.shards: ShardSource = HubShards(name, revision=self.revision, token=token)

    @property
    def fingerprint(self) -> str:
        """Of the id and the commit."""
        return xxhash.xxh3_64(f"{self.name}@{self.revision}".encode()).hexdigest()

    def small_files(self) -> list[Path]:
        """What a pack copies."""
        return _small_files(self.config_folder)


def open_source(model: str, *, revision: str | None, token: str | None) -> CheckpointSource:
    """The checkpoint ``model``; `SourceError` says what was looked for."""
    folder = Path(os.path.expanduser(model))  # Path's own raises RuntimeError where there is no such user
    if is_pack(folder):
        raise SourceError(f"{folder} is a pack already; run it, or name the checkpoint that it was made from")
    if folder.is_dir():
        return FolderSource(folder)
    if is_hub_id(model):
        return HubSource(model, revision, token)
    raise SourceError(f"{model!r} is neither a folder nor a hub id such as mistralai/Mixtral-8x7B-Instruct-v0.1")
