"""The safetensors shards of a checkpoint: which keys lie in which, opened when they are needed and given up after."""

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from moe_offload.errors import SourceError
from moe_offload.offload.checkpoint.shard_file import ShardFile, TensorEntry

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


class ShardSource(Protocol):
    """Where shards come from: a folder, or a hub that is asked for one at a time."""

    on_bytes: Callable[[int], None]
    """Told of bytes that are downloaded, or that need no download after all: `download_bytes` in the end."""

    @property
    def download_bytes(self) -> int:
        """How many bytes are to be downloaded for all shards, once `index` was called."""

    def index(self) -> tuple[Sequence[str], Mapping[str, str] | None]:
        """The names of the shards in order and, if the checkpoint has an index, the shard of every key."""

    def fetch(self, name: str) -> Path:
        """The path of a shard, downloaded if need be."""

    def discard(self, name: str) -> None:
        """Called once, when nothing of the shard is needed any more."""

    def close(self) -> None:
        """Called when nothing is asked for any more; what is unfinished may go on another time."""


def read_index(path: Path) -> tuple[list[str], dict[str, str]]:
    """The shards and the key map of a ``model.safetensors.index.json``; names must stay inside the folder."""
    try:
        weight_map = {str(key): str(name) for key, name in json.loads(path.read_text())["weight_map"].items()}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise SourceError(f"{path} is not a checkpoint index: {error!r}") from error
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise SourceError(f"{path} names a shard outside its folder: {name!r}")
    return names, weight_map


def no_weights_error(where: str | Path, files: Iterable[str]) -> SourceError:
    """What is wrong with a checkpoint that has no safetensors file among its ``files``."""
    found = ", ".join(sorted(name for name in files if Path(name).suffix in PICKLE_SUFFIXES)[:3])
    return SourceError(
        f"{where} holds no {SINGLE_FILE} and no {INDEX_FILE}"
        + (f", only {found}: pickled weights are not read; convert them to safetensors" if found else "")
    )


class FolderShards:
    """The shards of a checkpoint that lies in a folder; nothing is ever deleted."""

    download_bytes = 0

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.on_bytes: Callable[[int], None] = lambda num_bytes: None

    def index(self) -> tuple[Sequence[str], Mapping[str, str] | None]:
        """One file, or an index and its files; `SourceError` says what is missing."""
        if (self.folder / INDEX_FILE).is_file():
            names, weight_map = read_index(self.folder / INDEX_FILE)
            missing = [name for name in names if not (self.folder / name).is_file()]
            if missing:
                raise SourceError(f"{self.folder} lacks {len(missing)} of {len(names)} shards, first {missing[0]}")
            return names, weight_map
        if (self.folder / SINGLE_FILE).is_file():
            return [SINGLE_FILE], None
        raise no_weights_error(self.folder, (path.name for path in self.folder.iterdir()))

    def fetch(self, name: str) -> Path:
        """The path in the folder."""
        return self.folder / name

    def discard(self, name: str) -> None:
        """Nothing: the folder is the user's."""

    def close(self) -> None:
        """Nothing."""


class Shards:
    """Keys over all shards. A shard is opened on the first read of one of its keys and closed after the last."""

    def __init__(self, source: ShardSource) -> None:
        self._source = source
        names, weight_map = source.index()
        self.names = list(names)
        self._open: dict[int, ShardFile] = {}
        self._lock = threading.Lock()
        if weight_map is None:
            weight_map = {key: name for i, name in enumerate(self.names) for key in self._shard(i)}
        position = {name: i for i, name in enumerate(self.names)}
        self.shard_of = {key: position[name] for key, name in weight_map.items()}
        self._needed: list[set[str]] = [set() for _ in self.names]
        for key, shard in self.shard_of.items():
            self._needed[shard].add(key)

    def _shard(self, shard: int) -> ShardFile:
        with self._lock:
            if shard not in self._open:
                self._open[shard] = ShardFile(self._source.fetch(self.names[shard]))
            return self._open[shard]

    def fetch(self, keys: Iterable[str]) -> None:
        """Bring the shards of ``keys`` here, in order, before several threads ask for them."""
        for shard in sorted({self.shard_of[key] for key in keys}):
            self._shard(shard)

    def entry(self, key: str) -> TensorEntry:
        """Dtype, shape and place of a key."""
        shard = self._shard(self.shard_of[key])
        if key not in shard.entries:
            raise SourceError(f"{shard.path} lacks {key}, which the checkpoint's index says is there")
        return shard.entries[key]

    def read(self, key: str, rows: slice | None = None) -> torch.Tensor:
        """A fresh tensor with ``key``, or some leading rows of it."""
        self.entry(key)
        return self._shard(self.shard_of[key]).read(key, rows)

    def done(self, keys: Iterable[str]) -> None:
        """These keys are not needed again; a shard of which none is needed is closed and discarded."""
        for key in keys:
            shard = self.shard_of[key]
            if key in self._needed[shard]:
                self._needed[shard].remove(key)
                if not self._needed[shard]:
                    self._close(shard)
                    self._source.discard(self.names[shard])

    def _close(self, shard: int) -> None:
        if file := self._open.pop(shard, None):
            file.forget()
            file.close()

    def close(self) -> None:
        """Close what is open."""
        for shard in list(self._open):
            self._close(shard)
        self._source.close()
