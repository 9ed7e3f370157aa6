"""Writing safetensors files as a stream. Format: https://github.com/huggingface/safetensors#format."""

import json
import math
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import xxhash

from moe_offload.errors import PackCorruptError
from moe_offload.offload.pack.manifest import REPACK, SLOT_ALIGNMENT_BYTES, DenseFile, align
from moe_offload.offload.pack.partial_file import PARTIAL_SUFFIX, PartialFile

Buffer = bytes | bytearray | memoryview
DenseTensor = tuple[str, str, Sequence[int], Buffer]
ITEM_BYTES = dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1)
ITEM_BYTES |= dict.fromkeys(("U16", "I16", "F16", "BF16"), 2)
ITEM_BYTES |= dict.fromkeys(("U32", "I32", "F32"), 4)
ITEM_BYTES |= dict.fromkeys(("U64", "I64", "F64"), 8)
# Room for the header of a file whose tensors are not known yet when it is begun: about 400 of them.
HEADER_ROOM_BYTES = 64 << 10
WIDE_SUFFIX = ".wide" + PARTIAL_SUFFIX
_COPY_BYTES = 8 << 20


def header_bytes(tensors: Iterable[tuple[str, str, Sequence[int], int]], room_bytes: int = 0) -> bytes:
    """The start of a file holding ``(key, dtype, shape, size_bytes)`` one after the other.

    Padded with spaces to a multiple of 4096, of ``room_bytes`` at least, so that the data starts aligned.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset_bytes = 0
    for key, dtype, shape, size_bytes in tensors:
        if key in entries:
            raise ValueError(f"two tensors are named {key!r}")
        entries[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset_bytes, offset_bytes + size_bytes]}
        offset_bytes += size_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    total_bytes = max(room_bytes, align(8 + len(text), SLOT_ALIGNMENT_BYTES))
    return struct.pack("<Q", total_bytes - 8) + text.ljust(total_bytes - 8)


def write_dense_file(path: Path, tensors: Iterable[DenseTensor]) -> tuple[DenseFile, list[str]]:
    """Write ``(key, dtype, shape, data)`` as they come, holding one at a time; returns the file and its keys.

    Raises DiskFullError, and ValueError where a tensor's data is not as long as its shape says.
    """
    entries: list[tuple[str, str, Sequence[int], int]] = []
    digest = xxhash.xxh3_64()
    with PartialFile(path) as file:
        file.write(bytes(HEADER_ROOM_BYTES))
        for key, dtype, shape, data in tensors:
            view = memoryview(data)
            view = view.cast("B") if view.nbytes else memoryview(b"")
            if len(view) != math.prod(shape) * ITEM_BYTES[dtype]:
                raise ValueError(f"{key}: {len(view)} bytes for {dtype} of shape {tuple(shape)}")
            file.write(view)
            digest.update(view)
            entries.append((key, dtype, shape, len(view)))
        header = header_bytes(entries, HEADER_ROOM_BYTES)
        digest.update(header)
        size_bytes = file.size_bytes - HEADER_ROOM_BYTES + len(header)
        if len(header) == HEADER_ROOM_BYTES:
            file.write_at_start(header)
            file.commit()
        else:
            _move_behind(header, file)
    return DenseFile(path.name, size_bytes, digest.hexdigest()), [key for key, _, _, _ in entries]


def _move_behind(header: bytes, file: PartialFile) -> None:
    """Write ``file`` anew with a header that outgrew its room."""
    with PartialFile(file.path, file.size_bytes, WIDE_SUFFIX) as wide:
        wide.write(header)
        for offset_bytes in range(HEADER_ROOM_BYTES, file.size_bytes, _COPY_BYTES):
            wide.write(file.read_at(offset_bytes, min(_COPY_BYTES, file.size_bytes - offset_bytes)))
        wide.commit()


def dense_checksum(path: Path) -> str:
    """xxh3_64 over a safetensors file's data, then over its header with the eight bytes of length before it.

    In this order because a header that names every tensor is known only after their data has gone by.
    """
    digest = xxhash.xxh3_64()
    with path.open("rb", buffering=0) as file:
        start = file.read(8)
        length_bytes = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 0 <= length_bytes <= path.stat().st_size - 8:
            raise PackCorruptError(f"{path} is not a safetensors file; {REPACK}")
        header = start + file.read(length_bytes)
        buffer = memoryview(bytearray(_COPY_BYTES))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    digest.update(header)
    return digest.hexdigest()


def check_dense_file(folder: Path, dense: DenseFile) -> None:
    """Read a dense file whole and compare; raises PackCorruptError naming it."""
    path = folder / dense.file
    found = dense_checksum(path)
    if found != dense.checksum:
        raise PackCorruptError(f"{path} is damaged: its checksum is {found}, not {dense.checksum}; {REPACK}")
