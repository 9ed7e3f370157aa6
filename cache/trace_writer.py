"""A trace on its way to disk: frames appended to ``FILE.partial``, which becomes the ``.npz`` when it is closed."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_offload.cache.trace import Array
from moe_offload.cache.trace_file import PARTIAL_SUFFIX, read_trace, write_trace
from moe_offload.cache.trace_frames import encode_frame, file_header
from moe_offload.errors import ConfigError


class TraceWriter:
    """Appends pieces of a trace; each survives the process as soon as `write` returns. One thread at a time.

    A disk that fails or is full ends the trace: ``failure`` says why, nothing is raised, and what was written until
    then stays in the ``.partial``.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Creates the ``.partial``; ConfigError where that cannot be, or where one is left of an earlier run."""
        self.path = Path(path)
        self.partial_path = self.path.with_name(self.path.name + PARTIAL_SUFFIX)
        if self.path.is_dir():
            raise ConfigError(f"the trace {path} cannot be written: it is a folder")
        try:
            self._file = self.partial_path.open("xb", buffering=0)
        except FileExistsError as error:
            raise ConfigError(
                f"{self.partial_path} is there already: another process is recording it, or one was interrupted "
                "(it can be read as it is); move it away, or record to another file"
            ) from error
        except OSError as error:
            raise ConfigError(f"the trace {path} cannot be written: {error.strerror or error}") from error
        self.failure: str | None = None
        self._append(file_header())

    def write(self, arrays: Mapping[str, Array], meta: Mapping[str, Any] | None = None) -> None:
        """Append a piece; ``meta`` replaces what was said before."""
        if self.failure is None:
            self._append(encode_frame(arrays, meta))

    def _append(self, data: bytes) -> None:
        left = memoryview(data)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self.failure = f"{self.partial_path} cannot be written: {error.strerror or error}"

    def close(self) -> None:
        """Turn what was written into the ``.npz``; the ``.partial`` stays where that fails. May be called twice."""
        if self._file.closed:
            return
        self._file.close()
        if self.failure is not None:
            return
        try:
            write_trace(self.path, read_trace(self.partial_path))
            self.partial_path.unlink()
        except (ConfigError, OSError) as error:
            self.failure = str(error)

    def discard(self) -> None:
        """Nothing came of it: leave no file behind."""
        self._file.close()
        self.partial_path.unlink(missing_ok=True)


@contextmanager
def kept_if_used(path: str | os.PathLike[str] | None) -> Iterator[TraceWriter | None]:
    """A writer, or None without a path; discarded if what it is opened for fails."""
    writer = None if path is None else TraceWriter(path)
    try:
        yield writer
    except BaseException:
        if writer is not None:
            writer.discard()
        raise
