"""Checkpoints on the Hugging Face hub, one shard at a time.

A shard that is already in the user's hub cache is read there. Any other is downloaded (resuming what was begun) to a
folder of its own and deleted once nothing of it is needed, so that a checkpoint never lies on the disk as a whole.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from moe_offload.errors import SourceError
from moe_offload.offload.home import home_dir
from moe_offload.offload.shards import INDEX_FILE, SINGLE_FILE, read_index

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*|[A-Za-z0-9][\w.-]*")
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.jsonl", "LICENSE*"]
_Result = TypeVar("_Result")


def is_hub_id(model: str) -> bool:
    """Whether ``model`` could name a repository (``owner/name``)."""
    return _HUB_ID.fullmatch(model) is not None


def _asking(name: str, revision: str | None, ask: Callable[[], _Result]) -> _Result:
    """Turn the hub's errors into ours, each with what to do."""
    at = f"{name}@{revision}" if revision else name
    try:
        return ask()
    except GatedRepoError as error:
        raise SourceError(f"{at} is gated: accept its terms on its page, then log in or pass a token") from error
    except RevisionNotFoundError as error:
        raise SourceError(f"{name} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"no folder and no hub model is called {name!r}; check the spelling, or log in if it is private"
        ) from error
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):
            raise SourceError(f"{at} is not here and the hub cannot be reached; check the connection") from error
        raise SourceError(f"{at}: {error}") from error
    except (OfflineModeIsEnabled, ConnectionError) as error:
        raise SourceError(f"{at} is not here and the hub cannot be reached: {error}") from error
    except HFValidationError as error:
        raise SourceError(f"{name!r} is neither a folder nor a hub id: {error}") from error
    except (HfHubHTTPError, OSError) as error:
        raise SourceError(f"{at} could not be downloaded: {error}; run the command again to resume") from error


def fetch_small_files(name: str, *, revision: str | None, token: str | None) -> tuple[Path, str]:
    """Download what is not weights; the folder and the commit it is of."""
    folder = _asking(
        name,
        revision,
        lambda: snapshot_download(name, revision=revision, token=token, allow_patterns=_SMALL_FILES),
    )
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise SourceError(f"{name} has no config.json: it is not a transformers model")
    return path, path.name


class HubShards:
    """The shards of a hub model; each is downloaded when it is asked for."""

    def __init__(self, name: str, *, revision: str | None, token: str | None) -> None:
        self._name, self._revision, self._token = name, revision, token
        self._folder = home_dir() / "downloads" / f"{name.replace('/', '--')}-{(revision or 'main')[:12]}"

    def index(self) -> tuple[Sequence[str], Mapping[str, str] | None]:
        """From the checkpoint's index; a checkpoint without one is a single file."""
        cached = try_to_load_from_cache(self._name, INDEX_FILE, revision=self._revision)
        if isinstance(cached, str):
            return read_index(Path(cached))
        return [SINGLE_FILE], None

    def fetch(self, name: str) -> Path:
        """From the hub cache if it is there, else downloaded to a folder that `discard` empties."""
        cached = try_to_load_from_cache(self._name, name, revision=self._revision)
        if isinstance(cached, str):
            return Path(cached)
        path = _asking(
            f"{self._name}/{name}",
            self._revision,
            lambda: hf_hub_download(
                self._name, name, revision=self._revision, token=self._token, local_dir=self._folder
            ),
        )
        return Path(path)

    def discard(self, name: str) -> None:
        """Delete the shard, if it was downloaded here."""
        (self._folder / name).unlink(missing_ok=True)
