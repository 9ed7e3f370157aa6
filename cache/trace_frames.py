"""Pieces of a trace as framed bytes: length, CRC-32 and zlib; small, and whole up to the last frame after a crash."""

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from moe_offload.cache.trace import LAYOUT, Array
from moe_offload.errors import ConfigError

MAGIC = b"MOETRACE"
FRAME_VERSION = 1
_FILE_HEADER = struct.Struct("<8sI")  # magic, version
_FRAME_HEADER = struct.Struct("<II")  # length of what follows, its CRC-32
_TEXT_HEADER = struct.Struct("<I")  # length of the JSON before the arrays
MAX_FRAME_BYTES = 1 << 30  # uncompressed
_NARROW = tuple(np.dtype(name) for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "int64"))


def file_header() -> bytes:
    """What a file of frames begins with."""
    return _FILE_HEADER.pack(MAGIC, FRAME_VERSION)


def encode_frame(arrays: Mapping[str, Array], meta: Mapping[str, Any] | None = None) -> bytes:
    """One frame of arrays by their names in `LAYOUT`, and of ``meta``, which replaces what was said before."""
    data = zlib.compress(pack_arrays(arrays, meta), 1)
    return _FRAME_HEADER.pack(len(data), zlib.crc32(data)) + data


def pack_arrays(arrays: Mapping[str, Array], meta: Mapping[str, Any] | None = None) -> bytes:
    """The bytes of a frame before compression: a length, JSON, and the arrays one after the other.

    Integers are held less their least, in the narrowest type that takes them.
    """
    described, parts = [], []
    for name, array in arrays.items():
        base, narrow = _narrowed(array)
        described.append([name, narrow.dtype.str, list(narrow.shape), base])
        parts.append(narrow.tobytes())
    text = json.dumps({"arrays": described, "meta": meta}).encode()
    return b"".join([_TEXT_HEADER.pack(len(text)), text, *parts])


def _narrowed(array: Array) -> tuple[int, Array]:
    if array.dtype.kind not in "iu" or not array.size:
        return 0, array
    least, most = int(array.min()), int(array.max())
    base = least if most - least < 1 << 16 else 0  # what stays wide stays as it is, so that it compresses alike
    if array.dtype.itemsize == 8:
        base = least
    dtype = next(d for d in _NARROW if np.iinfo(d).min <= least - base and most - base <= np.iinfo(d).max)
    return base, (array.astype(np.int64) - base).astype(dtype)


def decode_frames(file: BinaryIO) -> Iterator[tuple[dict[str, Array], dict[str, Any] | None]]:
    """Every whole frame of a file, in order; ends quietly at the first that is not. ConfigError for another file."""
    header = file.read(_FILE_HEADER.size)
    if len(header) < _FILE_HEADER.size or not header.startswith(MAGIC):
        raise ConfigError("it is no trace")
    (_, version) = _FILE_HEADER.unpack(header)
    if version != FRAME_VERSION:
        raise ConfigError(f"its frames are of version {version}, this version reads {FRAME_VERSION}")
    while len(header := file.read(_FRAME_HEADER.size)) == _FRAME_HEADER.size:
        length, checksum = _FRAME_HEADER.unpack(header)
        data = file.read(length)
        if len(data) < length or zlib.crc32(data) != checksum:
            return
        yield _decoded(data)


def _decoded(data: bytes) -> tuple[dict[str, Array], dict[str, Any] | None]:
    """A frame whose checksum is right, and that may yet have been made by anybody."""
    try:
        whole = zlib.decompressobj().decompress(data, MAX_FRAME_BYTES)
        (length,) = _TEXT_HEADER.unpack_from(whole)
        begin = _TEXT_HEADER.size + length
        text = json.loads(whole[_TEXT_HEADER.size : begin])
        arrays: dict[str, Array] = {}
        for name, code, shape, base in text["arrays"]:
            dtype = np.dtype(str(code))
            if dtype.kind not in "iuf" or not all(type(n) is int and n >= 0 for n in [*shape, abs(base)]):
                raise ValueError(f"{name!r} is not an array of numbers")
            count = int(np.prod(shape, dtype=object))
            stored = np.frombuffer(whole, dtype, count, begin) if count else np.zeros(0, dtype)
            begin += stored.nbytes
            if name in LAYOUT:
                wide = stored if dtype.kind == "f" else stored.astype(np.int64) + base
                arrays[name] = wide.astype(LAYOUT[name][0]).reshape(shape)
        meta = text["meta"]
        if not (meta is None or isinstance(meta, dict)):
            raise ValueError("its meta is no object")
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
        struct.error,
        zlib.error,
    ) as e:
        raise ConfigError(f"a frame of it cannot be understood: {e}") from e
    return arrays, meta
