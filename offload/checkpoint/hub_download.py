"""One file of a hub repository, downloaded so that an interrupted download goes on where it ended.

huggingface_hub 2 begins a file anew in every process, which costs gigabytes where a shard is one file; so its building
blocks are used here with a partial file of a fixed name.
"""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.constants import MAX_HTTP_DOWNLOAD_SIZE
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]
from tqdm import tqdm

from moe_offload.errors import DiskFullError
from moe_offload.offload.planning.sizes import format_size

_SHA256 = re.compile(r"[0-9a-f]{64}")


def silent_bar(on_bytes: Callable[[int], None] = lambda num_bytes: None) -> Any:
    """A class that huggingface_hub takes for its progress bar; it draws nothing and tells ``on_bytes``."""

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **({k: v for k, v in kwargs.items() if k != "name"} | {"disable": True}))

        def update(self, n: float | None = 1) -> None:
            on_bytes(int(n or 0))

    return Bar


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_room(folder: Path, name: str, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise _disk_full(folder, name, needed_bytes, free_bytes)


def _disk_full(folder: Path, name: str, needed_bytes: int, free_bytes: int) -> DiskFullError:
    return DiskFullError(
        f"{name} needs {format_size(needed_bytes)} more while it is read, {folder} has {format_size(free_bytes)} free; "
        "make room and run the same command again, it goes on where it ended, or point MOE_OFFLOAD_HOME to another disk"
    )


def download_file(
    repo: str, name: str, *, revision: str, token: str | None, folder: Path, on_bytes: Callable[[int], None]
) -> Path:
    """``folder / name``, as it is in the commit ``revision`` of ``repo``; a part that is there already is kept.

    ``folder`` must be for this commit alone, and held by one process at a time. ``on_bytes`` is told of every byte,
    also of those that an earlier try left (negative for bytes that must be thrown away). Raises huggingface_hub's
    errors and `DiskFullError`.
    """
    path = folder / name
    if path.is_file():
        on_bytes(path.stat().st_size)
        return path
    url = hf_hub_url(repo, name, revision=revision)
    metadata = get_hf_file_metadata(url, token=token)
    size_bytes = metadata.size
    if size_bytes is not None and size_bytes > MAX_HTTP_DOWNLOAD_SIZE:  # only huggingface_hub's xet client has those
        _check_room(folder, name, size_bytes)
        bar = silent_bar(on_bytes)
        return Path(hf_hub_download(repo, name, revision=revision, token=token, local_dir=folder, tqdm_class=bar))
    partial = folder / f"{name}.partial"
    for may_resume in (True, False):
        if not may_resume:
            on_bytes(-partial.stat().st_size)
            partial.unlink()
        resumed_bytes = partial.stat().st_size if partial.exists() else 0
        if size_bytes is not None:
            _check_room(folder, name, size_bytes - resumed_bytes)
        on_bytes(resumed_bytes)
        _download(url, partial, resumed_bytes, size_bytes, token, on_bytes)
        # What an earlier process wrote may have been lost in a crash of the machine.
        etag = metadata.etag or ""
        if not resumed_bytes or not _SHA256.fullmatch(etag) or _sha256(partial) == etag:
            break
    os.replace(partial, path)
    return path


def _download(
    url: str,
    partial: Path,
    resumed_bytes: int,
    size_bytes: int | None,
    token: str | None,
    on_bytes: Callable[[int], None],
) -> None:
    with partial.open("ab") as file:
        try:
            http_get(
                url,
                file,
                resume_size=resumed_bytes,
                headers=build_hf_headers(token=token),
                expected_size=size_bytes,
                tqdm_class=silent_bar(on_bytes),
            )
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            needed_bytes = (size_bytes or 0) - partial.stat().st_size
            free_bytes = shutil.disk_usage(partial.parent).free
            raise _disk_full(partial.parent, partial.stem, needed_bytes, free_bytes) from error
