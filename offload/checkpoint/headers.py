"""What the headers of a checkpoint's shards tell: names, shapes and bytes of all tensors. No weight is read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_offload.errors import SourceError
from moe_offload.offload.checkpoint.shard_file import ShardFile, TensorEntry
from moe_offload.offload.checkpoint.shards import FolderShards


@dataclass(frozen=True)
class CheckpointHeaders:
    """A checkpoint without its weights; ``shards`` has the tensors of each shard, ``config_folder`` a config.json.

    ``fetched_bytes`` were asked of a hub for it, the config and the index aside.
    """

    name: str
    revision: str | None
    config_folder: Path
    shards: Mapping[str, Mapping[str, TensorEntry]]
    fetched_bytes: int = 0

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.size_bytes for entries in self.shards.values() for entry in entries.values())

    def entry(self, key: str) -> TensorEntry | None:
        """Shape and dtype of a tensor; None where there is none."""
        return next((entries[key] for entries in self.shards.values() if key in entries), None)


class HeaderShards:
    """Shards of which only the headers are here: a `ShardSource` that tells all keys and has nothing to read."""

    download_bytes = 0

    def __init__(self, headers: CheckpointHeaders) -> None:
        self._headers = headers
        self.on_bytes: Callable[[int], None] = lambda num_bytes: None

    def index(self) -> tuple[Sequence[str], Mapping[str, str] | None]:
        """All shards, and the shard of every key."""
        shards = self._headers.shards
        return list(shards), {key: name for name, entries in shards.items() for key in entries}

    def fetch(self, name: str) -> Path:
        """Refused: whoever asks would read weights."""
        raise AssertionError(f"{name} is known by its header alone")

    def discard(self, name: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def file_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a shard that lies here."""
    file = ShardFile(path)
    file.close()
    return file.entries


def folder_headers(folder: Path) -> CheckpointHeaders:
    """The headers of a checkpoint folder; `SourceError` says what is missing."""
    if not (folder / "config.json").is_file():
        raise SourceError(f"{folder} holds no config.json: it is not a checkpoint")
    names, _ = FolderShards(folder).index()
    return CheckpointHeaders(str(folder), None, folder, {name: file_header(folder / name) for name in names})
