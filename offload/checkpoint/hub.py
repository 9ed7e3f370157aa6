"""Checkpoints on the Hugging Face hub, one shard at a time.

A shard that is already in the user's hub cache is read there. Any other is downloaded (resuming what was begun) to a
folder of its own and deleted once nothing of it is needed, so that a checkpoint never lies on the disk as a whole.
"""

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, RepoFile, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of httpx, or from huggingface_hub 2 on of httpx2
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from moe_offload.errors import SourceError
from moe_offload.offload.checkpoint.hub_download import download_file, silent_bar
from moe_offload.offload.checkpoint.shards import INDEX_FILE, SINGLE_FILE, no_weights_error, read_index
from moe_offload.offload.home import home_dir

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*|[A-Za-z0-9][\w.-]*")
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.jsonl", "LICENSE*"]
_LOCK_FILE = "lock"
_Result = TypeVar("_Result")


def is_hub_id(model: str) -> bool:
    """Whether ``model`` could name a repository (``owner/name``)."""
    return _HUB_ID.fullmatch(model) is not None


def asking(name: str, revision: str | None, ask: Callable[[], _Result]) -> _Result:
    """Turn the hub's errors into ours, each with what to do."""
    at = f"{name}@{revision}" if revision else name
    try:
        return ask()
    except GatedRepoError as error:
        raise SourceError(f"{at} is gated: accept its terms on its page, then log in or pass a token") from error
    except RevisionNotFoundError as error:
        raise SourceError(f"{name} has no revision {revision!r}; its page lists its branches, tags, commits") from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"no folder and no hub model is called {name!r}; check the spelling, or log in if it is private"
        ) from error
    except OfflineModeIsEnabled as error:
        raise _offline(at) from error
    except EntryNotFoundError as error:
        if isinstance(error.__cause__, OfflineModeIsEnabled):
            raise _offline(at) from error
        if isinstance(error, LocalEntryNotFoundError):
            raise SourceError(
                f"no folder is called {name!r}, and the hub cannot be reached to ask for {at}; check the spelling "
                "and the connection"
            ) from error
        raise SourceError(f"{at} lacks a file: {_first_line(error)}") from error
    except HFValidationError as error:
        raise SourceError(f"{name!r} is neither a folder nor a hub id: {error}") from error
    except (HfHubHTTPError, HTTPError, OSError) as error:
        raise SourceError(
            f"{at} could not be downloaded ({_first_line(error)}); "
            "run the same command again, it goes on where it ended"
        ) from error


def _offline(at: str) -> SourceError:
    return SourceError(
        f"there is no folder {at}, it is not in the hub cache, and HF_HUB_OFFLINE forbids to ask the hub; check the "
        "spelling, or unset it"
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def fetch_small_files(name: str, *, revision: str | None, token: str | None) -> tuple[Path, str]:
    """Download what is not weights; the folder and the commit it is of."""
    folder = asking(
        name,
        revision,
        lambda: snapshot_download(
            name, revision=revision, token=token, allow_patterns=_SMALL_FILES, tqdm_class=silent_bar()
        ),
    )
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise SourceError(f"{name} has no config.json: it is not a transformers model")
    return path, path.name


class HubShards:
    """The shards of one commit of a hub model; each is downloaded when it is asked for."""

    def __init__(self, name: str, *, revision: str, token: str | None) -> None:
        self._name, self._revision, self._token = name, revision, token
        self._folder = home_dir() / "downloads" / f"{name.replace('/', '--')}-{revision[:12]}"
        self._lock_fd: int | None = None
        self._rest_bytes: dict[str, int] = {}  # of each shard, what is still to be told of as downloaded
        self.on_bytes: Callable[[int], None] = lambda num_bytes: None

    def _ask(self, what: str, ask: Callable[[], _Result]) -> _Result:
        return asking(f"{self._name}/{what}" if what else self._name, self._revision, ask)

    def _here(self, name: str) -> Path | None:
        """Where a file lies that needs no download."""
        cached = try_to_load_from_cache(self._name, name, revision=self._revision)
        if isinstance(cached, str):
            return Path(cached)
        return self._folder / name if (self._folder / name).is_file() else None

    def index(self) -> tuple[Sequence[str], Mapping[str, str] | None]:
        """From the checkpoint's index, or from the header of its only file."""
        if index := self._here(INDEX_FILE):
            names, weight_map = read_index(index)
        else:
            names, weight_map = [SINGLE_FILE], {}
        absent = [name for name in names if self._here(name) is None]
        if not absent:
            return names, weight_map or None
        sizes = self._ask("", self._sizes)
        if missing := [name for name in absent if name not in sizes]:
            if weight_map:
                raise SourceError(f"{self._name} lacks {len(missing)} of {len(names)} shards, first {missing[0]}")
            raise no_weights_error(self._name, sizes)
        self._rest_bytes = {name: sizes[name] for name in absent}
        if not weight_map:
            api = HfApi(token=self._token)
            header = self._ask(
                SINGLE_FILE,
                lambda: api.parse_safetensors_file_metadata(self._name, SINGLE_FILE, revision=self._revision),
            )
            weight_map = dict.fromkeys(header.tensors, SINGLE_FILE)
        return names, weight_map

    def _sizes(self) -> dict[str, int]:
        """Bytes of every file of the repository's root."""
        tree = HfApi(token=self._token).list_repo_tree(self._name, revision=self._revision)
        return {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}

    @property
    def download_bytes(self) -> int:
        """What is not here yet."""
        return sum(self._rest_bytes.values())

    def fetch(self, name: str) -> Path:
        """From the hub cache if it is there, else downloaded to a folder that `discard` empties."""
        if cached := self._here(name):
            return cached
        self._lock()
        return self._ask(
            name,
            lambda: download_file(
                self._name,
                name,
                revision=self._revision,
                token=self._token,
                folder=self._folder,
                on_bytes=lambda num_bytes: self._downloaded(name, num_bytes),
            ),
        )

    def _downloaded(self, name: str, num_bytes: int) -> None:
        self._rest_bytes[name] = self._rest_bytes.get(name, 0) - num_bytes
        self.on_bytes(num_bytes)

    def _lock(self) -> None:
        """Two processes that write one partial file would mix its bytes."""
        if self._lock_fd is not None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            fd = os.open(self._folder / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise SourceError(
                f"cannot write to {self._folder}: {error.strerror}; point MOE_OFFLOAD_HOME to another folder"
            ) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            raise SourceError(f"another process is downloading {self._name}; wait for it") from error
        self._lock_fd = fd

    def discard(self, name: str) -> None:
        """Delete the shard, if it was downloaded here."""
        (self._folder / name).unlink(missing_ok=True)
        self.on_bytes(self._rest_bytes.pop(name, 0))  # never downloaded, since nothing of it was needed any more

    def close(self) -> None:
        """Give up the folder; what is in it stays, to go on from."""
        if self._lock_fd is None:
            return
        if {path.name for path in self._folder.iterdir()} <= {_LOCK_FILE, ".cache"}:
            shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._lock_fd)
        self._lock_fd = None
