"""What a pack says about itself: ``pack.json``, read as untrusted input. The format is in ``docs/pack-format.md``."""

import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from moe_offload.errors import PackCorruptError, PackError, PackIncompleteError, PackVersionError
from moe_offload.offload.pack.strict_json import Fields, JsonShapeError, parse

FORMAT_NAME = "moe-offload-pack"
FORMAT_VERSION = 1
SHARE_VERSION = (
    2  # of packs that hold a part of the experts: those who know version 1 alone must not take them for whole
)
MANIFEST_NAME = "pack.json"
JOURNAL_NAME = "pack.journal"
SLOT_ALIGNMENT_BYTES = 4096
PART_ALIGNMENT_BYTES = 64
MAX_MANIFEST_BYTES = 256 << 20
REPACK = "delete its folder and make the pack again"

# One flat folder: a name holds no separator, so it cannot point elsewhere.
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_CHECKSUM = re.compile(r"[0-9a-f]{16}")


def align(size_bytes: int, alignment_bytes: int) -> int:
    """The next multiple of ``alignment_bytes``."""
    return -(-size_bytes // alignment_bytes) * alignment_bytes


@dataclass(frozen=True)
class PartSpec:
    """One packed weight inside an expert's slot; ``format`` is a spec that `moe_offload.quant.get_format` knows."""

    name: str
    shape: tuple[int, ...]
    format: str
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True)
class ExpertSpec:
    """Where one expert's ``slot_bytes`` lie, and the xxh3_64 of all of them in 16 hex digits."""

    file: str
    offset_bytes: int
    checksum: str


@dataclass(frozen=True)
class LayerLayout:
    """How every expert of one layer is laid out in its slot; raises PackCorruptError where it does not add up."""

    module: str
    num_experts: int
    slot_bytes: int
    parts: tuple[PartSpec, ...]

    def __post_init__(self) -> None:
        where = f"layer {self.module!r}"
        _check(bool(self.module), "a layer has no module name")
        _check(self.num_experts > 0, f"{where} has no experts")
        _check(
            self.slot_bytes > 0 and self.slot_bytes % SLOT_ALIGNMENT_BYTES == 0,
            f"{where}: slots of {self.slot_bytes} bytes are no multiple of {SLOT_ALIGNMENT_BYTES}",
        )
        _check(bool(self.parts), f"{where} has no parts")
        _check(len({part.name for part in self.parts}) == len(self.parts), f"{where} has two parts of one name")
        end_bytes = 0
        for part in sorted(self.parts, key=lambda part: part.offset_bytes):
            name = f"part {part.name!r} of {where}"
            _check(bool(part.name) and bool(part.format), f"{name} lacks a name or a format")
            _check(bool(part.shape) and min(part.shape) > 0, f"{name} has shape {part.shape}")
            _check(part.size_bytes > 0, f"{name} is empty")
            _check(
                part.offset_bytes >= 0 and part.offset_bytes % PART_ALIGNMENT_BYTES == 0,
                f"{name} starts at {part.offset_bytes}, no multiple of {PART_ALIGNMENT_BYTES}",
            )
            _check(part.offset_bytes >= end_bytes, f"{name} overlaps the part before it")
            end_bytes = part.offset_bytes + part.size_bytes
            _check(end_bytes <= self.slot_bytes, f"{name} ends at {end_bytes}, past its slot of {self.slot_bytes}")

    @classmethod
    def of(cls, module: str, num_experts: int, parts: Iterable[tuple[str, tuple[int, ...], str, int]]) -> "LayerLayout":
        """Lays out parts of ``(name, shape, format, size_bytes)`` in order, aligned and padded."""
        specs, offset_bytes = [], 0
        for name, shape, spec, size_bytes in parts:
            specs.append(PartSpec(name, shape, spec, offset_bytes, size_bytes))
            offset_bytes = align(offset_bytes + size_bytes, PART_ALIGNMENT_BYTES)
        return cls(module, num_experts, align(offset_bytes, SLOT_ALIGNMENT_BYTES), tuple(specs))


@dataclass(frozen=True)
class LayerSpec(LayerLayout):
    """One layer's experts: one after the other in one file, from ``first_offset_bytes`` on.

    ``held``: those that the pack holds, in this order; None for all of them.
    """

    file: str
    first_offset_bytes: int
    checksums: tuple[str, ...] = field(repr=False)
    held: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_file_name(self.file)
        _check(
            self.first_offset_bytes > 0 and self.first_offset_bytes % SLOT_ALIGNMENT_BYTES == 0,
            f"{self.file}: experts start at {self.first_offset_bytes}, no multiple of {SLOT_ALIGNMENT_BYTES}",
        )
        if self.held is not None:
            rising = all(before < after for before, after in zip((-1, *self.held), self.held, strict=False))
            _check(
                bool(self.held) and rising and self.held[-1] < self.num_experts,
                f"{self.file}: the experts held are none, or not in order, or not among {self.num_experts}",
            )
        num_held = self.num_experts if self.held is None else len(self.held)
        _check(len(self.checksums) == num_held, f"{self.file}: {len(self.checksums)} checksums for {num_held} experts")
        _check(all(map(_CHECKSUM.fullmatch, self.checksums)), f"{self.file}: a checksum is not 16 hex digits")

    @cached_property
    def experts(self) -> Mapping[int, ExpertSpec]:
        """The place of every expert that is there, by ``expert_idx``."""
        held = range(self.num_experts) if self.held is None else self.held
        return {
            expert_idx: ExpertSpec(self.file, self.first_offset_bytes + place * self.slot_bytes, checksum)
            for place, (expert_idx, checksum) in enumerate(zip(held, self.checksums, strict=True))
        }

    @property
    def end_bytes(self) -> int:
        """The length that the file has at least."""
        return self.first_offset_bytes + len(self.checksums) * self.slot_bytes


@dataclass(frozen=True)
class DenseFile:
    """A safetensors file of weights that are no experts; for ``checksum`` see `safetensors_file.dense_checksum`."""

    file: str
    size_bytes: int
    checksum: str

    def __post_init__(self) -> None:
        _check_file_name(self.file)
        _check(self.size_bytes > 0, f"{self.file} is empty")
        _check(_CHECKSUM.fullmatch(self.checksum) is not None, f"{self.file}: the checksum is not 16 hex digits")


@dataclass(frozen=True)
class PackManifest:
    """A whole pack; ``layers`` holds the MoE layers only, in the order in which the model runs them."""

    source: str
    revision: str | None
    expert_format: str
    dense_format: str
    created_by: str
    layers: tuple[LayerSpec, ...]
    dense: tuple[DenseFile, ...]
    extra: Mapping[str, str]

    def __post_init__(self) -> None:
        _check(bool(self.layers), "there are no expert layers")
        _check(len({layer.module for layer in self.layers}) == len(self.layers), "two layers have one module name")
        _check(len({dense.file for dense in self.dense}) == len(self.dense), "a dense file is listed twice")

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts that are there, padding included."""
        return sum(len(layer.checksums) * layer.slot_bytes for layer in self.layers)

    @property
    def is_whole(self) -> bool:
        """Whether it holds every expert."""
        return all(layer.held is None for layer in self.layers)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the files that hold everything else."""
        return sum(dense.size_bytes for dense in self.dense)

    def to_json(self) -> str:
        """The text of ``pack.json``: a line per layer and dense file."""
        head = {"format": FORMAT_NAME, "version": FORMAT_VERSION if self.is_whole else SHARE_VERSION}
        head |= {key: getattr(self, key) for key in _TEXTS}
        lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
        for key, entries in (("layers", self.layers), ("dense", self.dense)):
            rows = ",\n".join("  " + json.dumps(_without_none(asdict(entry))) for entry in entries)
            lines.append(f' "{key}": [\n{rows}\n ]' if rows else f' "{key}": []')
        lines.append(f' "extra": {json.dumps(dict(self.extra))}')
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "PackManifest":
        """The manifest in a text of unknown origin; raises PackVersionError or PackCorruptError, nothing else."""
        try:
            fields = Fields(parse(text), MANIFEST_NAME)
            if fields.text("format") != FORMAT_NAME:
                _corrupt(f"its format is not {FORMAT_NAME!r}")
            version = fields.integer("version")
            if version not in (FORMAT_VERSION, SHARE_VERSION):
                newer = "update moe-offload" if version > SHARE_VERSION else REPACK
                raise PackVersionError(
                    f"the pack has format version {version}, this moe-offload reads {FORMAT_VERSION} and "
                    f"{SHARE_VERSION}; {newer}"
                )
            manifest = cls(
                source=fields.text("source"),
                revision=fields.optional_text("revision"),
                expert_format=fields.text("expert_format"),
                dense_format=fields.text("dense_format"),
                created_by=fields.text("created_by"),
                layers=tuple(layer_from_json(value) for value in fields.items("layers")),
                dense=tuple(dense_from_json(value) for value in fields.items("dense")),
                extra=fields.text_map("extra"),
            )
            fields.done()
        except JsonShapeError as error:
            _corrupt(str(error))
        if manifest.is_whole != (version == FORMAT_VERSION):
            _corrupt(f"format version {version} does not go with the experts that it lists")
        return manifest


_TEXTS = ("source", "revision", "expert_format", "dense_format", "created_by")


def is_pack(folder: str | os.PathLike[str]) -> bool:
    """Whether ``folder`` holds a finished pack, by the presence of its ``pack.json``."""
    return os.path.isfile(os.path.join(folder, MANIFEST_NAME))


def read_manifest(folder: str | os.PathLike[str]) -> PackManifest:
    """The manifest of the pack in ``folder``, with every file it names present, inside the folder and long enough.

    Raises PackError where there is no pack, PackIncompleteError where packing was interrupted, PackVersionError,
    and PackCorruptError for all else. Contents are not read: experts are checked when they are loaded.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    try:
        with path.open("rb") as file:
            text = file.read(MAX_MANIFEST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        if (folder / JOURNAL_NAME).exists():
            raise PackIncompleteError(
                f"{folder}: packing was not finished; run the same `moe-offload pack` again to go on with it"
            ) from error
        raise PackError(
            f"{folder} is not a pack: it has no {MANIFEST_NAME}; make one with `moe-offload pack`"
        ) from error
    except (OSError, ValueError) as error:
        raise PackError(f"cannot read {path}: {error}") from error
    if len(text) > MAX_MANIFEST_BYTES:
        raise PackCorruptError(f"{path} is longer than {MAX_MANIFEST_BYTES} bytes; {REPACK}")
    try:
        manifest = PackManifest.from_json(text)
    except PackError as error:
        raise type(error)(f"{path}: {error}") from error
    _check_files(folder, manifest)
    return manifest


def layer_from_json(value: Any) -> LayerSpec:
    """One element of ``layers``; raises JsonShapeError or PackCorruptError."""
    fields = Fields(value, "a layer")
    held = fields.integers("held") if fields.has("held") else None
    layer = LayerSpec(
        module=fields.text("module"),
        num_experts=fields.integer("num_experts"),
        slot_bytes=fields.integer("slot_bytes"),
        parts=tuple(_part_from_json(part) for part in fields.items("parts")),
        file=fields.text("file"),
        first_offset_bytes=fields.integer("first_offset_bytes"),
        checksums=tuple(fields.texts("checksums")),
        held=None if held is None else tuple(held),
    )
    fields.done()
    return layer


def dense_from_json(value: Any) -> DenseFile:
    """One element of ``dense``; raises JsonShapeError or PackCorruptError."""
    fields = Fields(value, "a dense file")
    dense = DenseFile(fields.text("file"), fields.integer("size_bytes"), fields.text("checksum"))
    fields.done()
    return dense


def _part_from_json(value: Any) -> PartSpec:
    fields = Fields(value, "a part")
    part = PartSpec(
        name=fields.text("name"),
        shape=tuple(fields.integers("shape")),
        format=fields.text("format"),
        offset_bytes=fields.integer("offset_bytes"),
        size_bytes=fields.integer("size_bytes"),
    )
    fields.done()
    return part


def _without_none(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if value is not None}


def _check_files(folder: Path, manifest: PackManifest) -> None:
    needed: dict[str, int] = {}
    for layer in manifest.layers:
        needed[layer.file] = max(layer.end_bytes, needed.get(layer.file, 0))
    inside = folder.resolve()
    for name, size_bytes in needed.items() | {dense.file: dense.size_bytes for dense in manifest.dense}.items():
        path = folder / name
        try:
            status = path.stat()
            leaves = path.resolve().parent != inside
        except (OSError, ValueError, RuntimeError) as error:
            raise PackCorruptError(f"{path} is missing from the pack ({error}); {REPACK}") from error
        if leaves:
            raise PackCorruptError(f"{path} is a link that leaves the pack's folder; copy the file there")
        if not stat.S_ISREG(status.st_mode):
            raise PackCorruptError(f"{path} is not a regular file; {REPACK}")
        if status.st_size < size_bytes:
            raise PackCorruptError(f"{path} has {status.st_size} bytes of {size_bytes}: it is truncated; {REPACK}")


def _check_file_name(name: str) -> None:
    _check(_FILE_NAME.fullmatch(name) is not None, f"{name!r:.80} is not a file name inside the pack")


def _check(holds: bool, message: str) -> None:
    if not holds:
        _corrupt(message)


def _corrupt(message: str) -> NoReturn:
    raise PackCorruptError(f"{message}; {REPACK}")
