"""Writes a pack, a file at a time, so that it can stop at any moment and go on later. Holds one expert at most.

A file is written under a partial name, synced and renamed, and only then entered into the journal; ``pack.json``
comes last. So a folder with ``pack.json`` holds a whole pack, and one without it resumes or starts clean.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

import xxhash

from moe_offload._version import VERSION
from moe_offload.errors import ConfigError, PackCorruptError
from moe_offload.offload.pack.journal import PackJournal
from moe_offload.offload.pack.manifest import (
    JOURNAL_NAME,
    MANIFEST_NAME,
    DenseFile,
    LayerLayout,
    LayerSpec,
    PackManifest,
    dense_from_json,
    is_pack,
    layer_from_json,
)
from moe_offload.offload.pack.partial_file import PARTIAL_SUFFIX, PartialFile, typed_write_errors
from moe_offload.offload.pack.safetensors_file import DenseTensor, header_bytes, write_dense_file
from moe_offload.offload.pack.strict_json import JsonShapeError

__all__ = ["LayerLayout", "LayerWriter", "PackWriter"]

INDEX_NAME = "dense.safetensors.index.json"
_DENSE_NAME = re.compile(r"dense-\d{5,}\.safetensors")
# The names this writer gives to files of its own accord: the only ones it ever deletes besides those it copied.
_OWN_NAME = re.compile(
    r"((experts|dense)-\d{5,}\.safetensors|dense\.safetensors\.index\.json|pack\.json)(\.wide)?(\.partial)?"
)


class LayerWriter:
    """Takes the experts of one layer in order."""

    def __init__(self, file: PartialFile, layout: LayerLayout, expert_ids: Sequence[int]) -> None:
        self._file = file
        self._layout = layout
        self._expert_ids = expert_ids
        self.checksums: list[str] = []

    def write_expert(self, expert_idx: int, data: bytes | bytearray | memoryview) -> None:
        """Append one expert's ``slot_bytes``, padding included; raises DiskFullError."""
        view = memoryview(data).cast("B")
        expected = self._expert_ids[len(self.checksums)] if len(self.checksums) < len(self._expert_ids) else None
        if expert_idx != expected or len(view) != self._layout.slot_bytes:
            raise ValueError(
                f"expected expert {expected} in {self._layout.slot_bytes} bytes, got expert {expert_idx} in {len(view)}"
            )
        self._file.write(view)
        self.checksums.append(xxhash.xxh3_64_hexdigest(view))


class PackWriter:
    """One pack being written into ``folder``.

    ``identity`` names everything the bytes depend on (source, revision, formats): an interrupted pack of the same
    identity resumes, one of another starts clean. A folder is taken only if it is empty, new, or has a journal.
    """

    def __init__(self, folder: str | os.PathLike[str], *, identity: Mapping[str, str]) -> None:
        """Lock the folder and remove what an interrupted run left half done; raises ConfigError, DiskFullError."""
        self._folder = Path(folder)
        self._layers: dict[int, LayerSpec] = {}
        self._dense: dict[str, tuple[DenseFile, list[str]]] = {}
        self._copied: set[str] = set()
        _check_usable(self._folder)
        with typed_write_errors(self._folder / JOURNAL_NAME, 4096):
            self._journal = PackJournal(self._folder)
        try:
            # Under the lock: another process may just have finished the pack.
            _check_usable(self._folder)
            self._load_journal()
            if self._journal.identity == dict(identity):
                self._remove_strays()
            else:
                self._start_clean(identity)
        except BaseException:
            self._journal.close()
            raise

    def __enter__(self) -> "PackWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unlock the folder; an unfinished pack stays there to be resumed."""
        self._journal.close()

    def done_layers(self) -> set[int]:
        """Layers that are whole."""
        return set(self._layers)

    def done_dense(self) -> set[str]:
        """Names of dense files that are whole."""
        return set(self._dense)

    @contextmanager
    def layer(self, layer_idx: int, layout: LayerLayout, held: Sequence[int] | None = None) -> Iterator[LayerWriter]:
        """Write one layer's experts; the layer counts when the block ends with all of them written, else not at all.

        ``held``: those that the pack is to hold, in order; None for all.
        """
        if layer_idx in self._layers:
            raise ValueError(f"layer {layer_idx} is already written")
        path = self._folder / f"experts-{layer_idx:05d}.safetensors"
        expert_ids = range(layout.num_experts) if held is None else held
        header = header_bytes(
            (f"layers.{layer_idx}.experts.{expert_idx}", "U8", (layout.slot_bytes,), layout.slot_bytes)
            for expert_idx in expert_ids
        )
        with PartialFile(path, len(header) + len(expert_ids) * layout.slot_bytes) as file:
            writer = LayerWriter(file, layout, expert_ids)
            file.write(header)
            yield writer
            spec = LayerSpec(
                layout.module,
                layout.num_experts,
                layout.slot_bytes,
                layout.parts,
                file=path.name,
                first_offset_bytes=len(header),
                checksums=tuple(writer.checksums),
                held=None if held is None else tuple(held),
            )
            file.commit()
        self._journal.append({"layer": layer_idx, "spec": asdict(spec)})
        self._layers[layer_idx] = spec

    def dense_file(self, name: str, tensors: Iterable[DenseTensor]) -> DenseFile:
        """Write ``dense-XXXXX.safetensors`` from ``(key, dtype, shape, data)`` as they come, holding one at a time.

        ``dtype`` is a safetensors name such as "BF16"; ``data`` its bytes. Raises DiskFullError.
        """
        if _DENSE_NAME.fullmatch(name) is None:
            raise ValueError(f"{name!r} is not of the form dense-00000.safetensors")
        if name in self._dense:
            raise ValueError(f"{name} is already written")
        dense, keys = write_dense_file(self._folder / name, tensors)
        self._journal.append({"dense": asdict(dense), "keys": keys})
        self._dense[name] = (dense, keys)
        return dense

    def copy_file(self, path: str | os.PathLike[str], name: str | None = None) -> None:
        """Copy a configuration or tokenizer file into the pack; raises ConfigError rather than replace a stranger's."""
        source = Path(path)
        name = source.name if name is None else name
        target = self._folder / name
        if target.parent != self._folder or _OWN_NAME.fullmatch(name) or name.startswith(JOURNAL_NAME):
            raise ValueError(f"{name!r} is not a name for a file copied into a pack")
        if name not in self._copied:
            if target.exists():
                raise ConfigError(f"{target} is in the way and not part of the pack; move it or choose another folder")
            # Entered before it is written, so that a clean start knows that it may delete it.
            self._journal.append({"copied": name})
            self._copied.add(name)
            target.with_name(name + PARTIAL_SUFFIX).unlink(missing_ok=True)
        with source.open("rb") as file, PartialFile(target, source.stat().st_size) as copy:
            while chunk := file.read(1 << 20):
                copy.write(chunk)
            copy.commit()

    def finish(
        self,
        *,
        source: str,
        revision: str | None,
        expert_format: str,
        dense_format: str,
        created_by: str = f"moe-offload {VERSION}",
        extra: Mapping[str, str] | None = None,
    ) -> PackManifest:
        """Write the index of dense files and, last, ``pack.json``; the journal goes. Layers must be 0, 1, 2, ..."""
        if set(self._layers) != set(range(len(self._layers))):
            raise ValueError(f"layers are missing: only {sorted(self._layers)} are written")
        manifest = PackManifest(
            source=source,
            revision=revision,
            expert_format=expert_format,
            dense_format=dense_format,
            created_by=created_by,
            layers=tuple(self._layers[layer_idx] for layer_idx in sorted(self._layers)),
            dense=tuple(self._dense[name][0] for name in sorted(self._dense)),
            extra=dict(extra or {}),
        )
        weight_map = {key: name for name in sorted(self._dense) for key in self._dense[name][1]}
        self._write_text(INDEX_NAME, json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1))
        self._write_text(MANIFEST_NAME, manifest.to_json())
        self._journal.remove()
        return manifest

    def _write_text(self, name: str, text: str) -> None:
        data = text.encode()
        with PartialFile(self._folder / name, len(data)) as file:
            file.write(data)
            file.commit()

    def _load_journal(self) -> None:
        """Take over the files that the journal vouches for and that are still there in full length."""
        for entry in self._journal.entries:
            try:
                if "layer" in entry:
                    layer = layer_from_json(entry["spec"])
                    if self._has(layer.file, layer.end_bytes):
                        self._layers[int(entry["layer"])] = layer
                elif "dense" in entry:
                    dense = dense_from_json(entry["dense"])
                    if self._has(dense.file, dense.size_bytes):
                        self._dense[dense.file] = (dense, list(entry["keys"]))
                elif Path(entry["copied"]).name == entry["copied"]:
                    self._copied.add(entry["copied"])
                else:
                    raise ValueError(f"{entry['copied']!r} is outside the folder")
            except (KeyError, TypeError, ValueError, JsonShapeError, PackCorruptError) as error:
                raise ConfigError(
                    f"{self._folder / JOURNAL_NAME} is damaged ({error!r}); delete {self._folder} and pack again"
                ) from error

    def _has(self, name: str, size_bytes: int) -> bool:
        path = self._folder / name
        return path.is_file() and not path.is_symlink() and path.stat().st_size == size_bytes

    def _start_clean(self, identity: Mapping[str, str]) -> None:
        for name in self._copied:
            (self._folder / name).unlink(missing_ok=True)
            (self._folder / (name + PARTIAL_SUFFIX)).unlink(missing_ok=True)
        self._layers, self._dense, self._copied = {}, {}, set()
        self._remove_strays()
        self._journal.restart(identity)

    def _remove_strays(self) -> None:
        """Delete files of a pack's names that are not whole: partial ones, and those no journal line vouches for."""
        whole = {layer.file for layer in self._layers.values()} | set(self._dense)
        copies = {name + PARTIAL_SUFFIX for name in self._copied}
        for path in self._folder.iterdir():
            if (_OWN_NAME.fullmatch(path.name) and path.name not in whole) or path.name in copies:
                path.unlink()


def _check_usable(folder: Path) -> None:
    """Create the folder; raises ConfigError if it holds a pack, or files that no pack explains."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise ConfigError(f"cannot pack into {folder}: {error.strerror}; choose another folder") from error
    if is_pack(folder):
        raise ConfigError(f"{folder} already holds a finished pack; use it, delete it, or choose another folder")
    if names and JOURNAL_NAME not in names:
        raise ConfigError(
            f"{folder} holds files that are no pack ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}); "
            "choose an empty or new folder"
        )
