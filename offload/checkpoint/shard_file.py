"""One safetensors file, read with ``pread``: no mapping, so that what was read does not stay in the process's memory.

The byte format is the one of https://github.com/huggingface/safetensors#format: eight bytes of little-endian header
length, a JSON header, the data.
"""

import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_offload.errors import SourceError

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset_bytes: int
    size_bytes: int


def parse_header(header: bytes, name: str) -> dict[str, TensorEntry]:
    """The tensors that the JSON after the eight bytes of length names; `SourceError` where it is damaged."""
    try:
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        return {key: _entry(value, 8 + len(header)) for key, value in tensors.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{name} has a damaged safetensors header: {error!r}") from error


def _entry(value: dict[str, object], data_start: int) -> TensorEntry:
    begin, end = value["data_offsets"]  # type: ignore[misc]
    dtype = DTYPES[str(value["dtype"])]
    shape = tuple(int(size) for size in value["shape"])  # type: ignore[attr-defined]
    if end - begin != math.prod(shape) * dtype.itemsize or begin < 0:  # type: ignore[has-type]
        raise ValueError(f"shape {shape} does not take {end - begin} bytes")  # type: ignore[has-type]
    return TensorEntry(dtype, shape, data_start + begin, end - begin)  # type: ignore[has-type]


class ShardFile:
    """The tensors of one safetensors file, each read on its own or a few of its leading rows at a time."""

    def __init__(self, path: Path) -> None:
        """Read the header; a file that is not whole raises `SourceError`."""
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise SourceError(f"cannot open {path}: {error.strerror}") from error
        try:
            self.entries = self._read_header()
        except BaseException:
            os.close(self._fd)
            raise

    def _read_header(self) -> dict[str, TensorEntry]:
        file_bytes = os.fstat(self._fd).st_size
        start = os.pread(self._fd, 8, 0)
        header_bytes = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, file_bytes - 8):
            raise SourceError(f"{self.path} is not a safetensors file, or is truncated ({file_bytes} bytes)")
        entries = parse_header(os.pread(self._fd, header_bytes, 8), str(self.path))
        end = max((entry.offset_bytes + entry.size_bytes for entry in entries.values()), default=0)
        if end > file_bytes:
            raise SourceError(f"{self.path} is truncated: {file_bytes} bytes of {end}; download it again")
        return entries

    def read(self, key: str, rows: slice | None = None) -> torch.Tensor:
        """A fresh tensor with all of ``key``, or with contiguous rows of its first dimension."""
        entry = self.entries[key]
        shape, offset_bytes, size_bytes = entry.shape, entry.offset_bytes, entry.size_bytes
        if rows is not None:
            first, last, step = rows.indices(shape[0])
            assert step == 1, "rows are contiguous"
            row_bytes = size_bytes // shape[0]
            shape = (last - first, *shape[1:])
            offset_bytes, size_bytes = offset_bytes + first * row_bytes, (last - first) * row_bytes
        # Read as bytes and viewed: numpy, which offers the buffer, has no bfloat16 or float8.
        data = torch.empty(size_bytes, dtype=torch.uint8)
        self._pread_into(memoryview(data.numpy().data), offset_bytes, key)
        return data.view(entry.dtype).reshape(shape) if size_bytes else torch.empty(shape, dtype=entry.dtype)

    def _pread_into(self, memory: memoryview, offset_bytes: int, key: str) -> None:
        done_bytes = 0
        while done_bytes < len(memory):
            try:
                count = os.preadv(self._fd, [memory[done_bytes:]], offset_bytes + done_bytes)
            except OSError as error:
                raise SourceError(f"cannot read {key} from {self.path}: {error.strerror}") from error
            if count == 0:
                raise SourceError(f"{self.path} ended while {key} was read; it changed or is truncated")
            done_bytes += count

    def expect_random_reads(self) -> None:
        """Tell the system not to read ahead: what follows will not be asked for."""
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)

    def forget(self) -> None:
        """Tell the system that the file's cached pages are not needed again."""
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the file; nothing can be read afterwards."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)
