"""Traces as ``.npz`` files: written at once or not at all, read as untrusted input."""

import json
import os
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moe_offload.cache.trace import LAYOUT, TRACE_VERSION, Array, RoutingTrace
from moe_offload.cache.trace_blocks import join_blocks
from moe_offload.cache.trace_frames import MAGIC, decode_frames
from moe_offload.errors import ConfigError

VERSION_KEY = "trace_version"
PARTIAL_SUFFIX = ".partial"


def write_trace(path: str | os.PathLike[str], trace: RoutingTrace) -> None:
    """Write ``trace`` to ``path``, beside it first, so that no half-written trace is ever there."""
    target = Path(path)
    partial = target.with_name(f"{target.name}.{os.getpid()}.writing")
    meta = json.dumps({VERSION_KEY: TRACE_VERSION} | dict(trace.meta))
    try:
        try:
            with partial.open("wb") as file:
                np.savez_compressed(file, meta=np.array(meta), **trace.arrays())  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        finally:
            with suppress(OSError):
                partial.unlink()
    except OSError as error:
        raise ConfigError(f"the trace {path} cannot be written: {error.strerror or error}") from error


def read_trace(path: str | os.PathLike[str]) -> RoutingTrace:
    """The trace in an ``.npz`` file, or in a ``.partial`` up to its last whole frame.

    ConfigError for a file that is neither. Arrays that are not known are left out.
    """
    try:
        with Path(path).open("rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                file.seek(0)
                return _read_partial(path, file)
        with zipfile.ZipFile(path) as stored:
            arrays, meta = _read_arrays(stored)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise ConfigError(f"{path} does not fit into memory") from error
    except (
        ValueError,
        EOFError,
        TypeError,
        KeyError,
        RuntimeError,
        RecursionError,
        zlib.error,
        zipfile.BadZipFile,
    ) as error:
        raise ConfigError(f"{path} is not an .npz file of arrays: {error}") from error
    if "experts" not in arrays:
        raise ConfigError(f"{path} has no array 'experts' of integers [tokens, layers, top_k]")
    version = meta.get(VERSION_KEY, TRACE_VERSION)
    if type(version) is not int or version > TRACE_VERSION:
        raise ConfigError(f"{path} is a trace of version {version!r}, this version reads up to {TRACE_VERSION}; update")
    try:
        return RoutingTrace(meta=meta, **arrays)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _read_partial(path: str | os.PathLike[str], file: BinaryIO) -> RoutingTrace:
    meta: dict[str, Any] = {}
    blocks = []
    try:
        for arrays, said in decode_frames(file):
            meta = meta if said is None else said
            blocks.append(arrays)
        return join_blocks(blocks, meta)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _read_arrays(stored: zipfile.ZipFile) -> tuple[dict[str, Array], dict[str, Any]]:
    names = set(stored.namelist())
    arrays = {name: _read_array(stored, name) for name in LAYOUT if f"{name}.npy" in names}
    meta: Any = {}
    if "meta.npy" in names:
        text = _read_array(stored, "meta")
        if text.ndim or text.dtype.kind != "U":
            raise ValueError("its 'meta' is not one text")
        meta = json.loads(str(text))
        if not isinstance(meta, dict):
            raise ValueError("its 'meta' is not a JSON object")
    return arrays, meta


def _read_array(stored: zipfile.ZipFile, name: str) -> Array:
    with stored.open(f"{name}.npy") as file:
        array: Array = np.lib.format.read_array(file, allow_pickle=False)
        return array
