"""What an unfinished pack has so far: a line of JSON per finished file, and the lock of the folder."""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_offload.errors import ConfigError
from moe_offload.offload.pack.manifest import FORMAT_VERSION, JOURNAL_NAME
from moe_offload.offload.pack.partial_file import sync_folder, typed_write_errors, write_all


class PackJournal:
    """The journal of one folder, held by one process at a time; a line that was cut off in a crash is dropped.

    The first line is the identity of the pack, each other one says that a file is whole and synced.
    """

    def __init__(self, folder: Path) -> None:
        """Open or create the journal and lock it; raises ConfigError while another process packs there."""
        self._path = folder / JOURNAL_NAME
        self._fd = self._open_locked()
        self.identity: dict[str, str] | None = None
        self.entries: list[dict[str, Any]] = []
        try:
            self._size_bytes = self._read()
            os.ftruncate(self._fd, self._size_bytes)
        except BaseException:
            os.close(self._fd)
            raise

    def _open_locked(self) -> int:
        while True:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The process that held the lock may have finished its pack and removed the file just before.
                if self._path.exists() and os.path.samestat(os.fstat(fd), self._path.stat()):
                    return fd
            except BlockingIOError as error:
                os.close(fd)
                raise ConfigError(
                    f"another process is packing into {self._path.parent}; wait for it, or choose another folder"
                ) from error
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def _read(self) -> int:
        """Parse the lines up to the first that is not whole; returns their length in bytes."""
        with open(os.dup(self._fd), "rb") as file:
            file.seek(0)
            lines = file.read().splitlines(keepends=True)
        size_bytes = 0
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or not isinstance(entry, dict):
                break
            if size_bytes == 0:
                if entry.get("version") != FORMAT_VERSION or not isinstance(entry.get("identity"), dict):
                    break
                self.identity = entry["identity"]
            else:
                self.entries.append(entry)
            size_bytes += len(line)
        return size_bytes

    def restart(self, identity: Mapping[str, str]) -> None:
        """Forget everything and begin with ``identity``."""
        os.ftruncate(self._fd, 0)
        self._size_bytes = 0
        self.identity = dict(identity)
        self.entries = []
        self._write({"version": FORMAT_VERSION, "identity": self.identity})
        sync_folder(self._path.parent)

    def append(self, entry: dict[str, Any]) -> None:
        """Add a line and sync it; raises DiskFullError, without leaving half a line."""
        self._write(entry)
        self.entries.append(entry)

    def _write(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry).encode() + b"\n"
        try:
            with typed_write_errors(self._path, len(line)):
                write_all(self._fd, line)
                os.fsync(self._fd)
        except BaseException:
            os.ftruncate(self._fd, self._size_bytes)
            raise
        self._size_bytes += len(line)

    def remove(self) -> None:
        """Delete the journal: the pack is finished."""
        self._path.unlink()
        self.close()

    def close(self) -> None:
        """Give up the lock, keeping the journal."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
