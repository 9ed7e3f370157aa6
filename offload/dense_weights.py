"""The dense weights of a pack, handed to transformers' loader tensor by tensor."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from moe_offload.errors import PackCorruptError, SourceError
from moe_offload.offload.checkpoint.shard_file import ShardFile
from moe_offload.offload.pack.manifest import REPACK, PackManifest
from moe_offload.offload.pack.safetensors_file import check_dense_file


class DenseSlice:
    """A tensor on the disk; ``[...]`` reads it, as with a slice of safetensors."""

    def __init__(self, file: ShardFile, key: str) -> None:
        self._file, self._key = file, key

    def __getitem__(self, index: Any) -> torch.Tensor:
        assert index is ..., "dense tensors are read whole"
        return self._file.read(self._key)

    def get_shape(self) -> list[int]:
        """As safetensors' slices have it."""
        return list(self._file.entries[self._key].shape)


class DenseWeights(Mapping[str, DenseSlice]):
    """All dense tensors of a pack by their names in the model's state dict; a context that closes its files."""

    def __init__(self, folder: Path, manifest: PackManifest) -> None:
        """Read the headers, nothing else."""
        self._folder, self._manifest = folder, manifest
        self._files: dict[str, ShardFile] = {}
        for dense in manifest.dense:
            try:
                file = ShardFile(folder / dense.file)
            except SourceError as error:
                raise PackCorruptError(f"{error}; {REPACK}") from error
            self._files |= dict.fromkeys(file, file)

    def __getitem__(self, key: str) -> DenseSlice:
        return DenseSlice(self._files[key], key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def check(self) -> None:
        """Read the files once and compare their checksums; `PackCorruptError` names a damaged one."""
        for dense in self._manifest.dense:
            check_dense_file(self._folder, dense)

    def reopened(self, key: str) -> ShardFile:
        """The file of ``key`` once more, for somebody who reads it for longer and closes it."""
        return ShardFile(self._files[key].path)

    def resident_bytes(self, dtype: torch.dtype, *, without: str | None = None) -> int:
        """Bytes in memory when floating-point tensors are in ``dtype``; packed and integer ones stay as they are.

        ``without``: a tensor that stays in the pack.
        """
        return sum(size_bytes for key, size_bytes in self.resident_sizes(dtype).items() if key != without)

    def resident_sizes(self, dtype: torch.dtype) -> dict[str, int]:
        """The same of each tensor."""
        sizes = {}
        for key, file in self._files.items():
            entry = file.entries[key]
            itemsize = dtype.itemsize if entry.dtype.is_floating_point else entry.dtype.itemsize
            sizes[key] = entry.size_bytes // entry.dtype.itemsize * itemsize
        return sizes

    def close(self) -> None:
        """Close the files and let go of what the system cached of them."""
        for file in set(self._files.values()):
            file.forget()
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
