"""Making a pack from a checkpoint: every expert converted, quantised and written once, a few at a time.

Peak memory is one or two experts unquantised (fewer than `WINDOW_BYTES` if two fit) and the largest dense tensor.
Shards are gone through in order and given up one by one, so that a checkpoint on a hub never lies here as a whole.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig

from moe_offload._version import VERSION
from moe_offload.errors import ConfigError, FormatError, SourceError, UnsupportedModelError
from moe_offload.offload.checkpoint.conversion import (
    Checkpoint,
    ConversionPlan,
    ExpertParamSource,
    ParamSource,
    plan_conversion,
)
from moe_offload.offload.checkpoint.shard_file import DTYPE_NAMES
from moe_offload.offload.checkpoint.shards import Shards, ShardSource
from moe_offload.offload.checkpoint.source_quantization import Packed, codec_for
from moe_offload.offload.checkpoint.sources import CheckpointSource, open_source
from moe_offload.offload.checkpoint.transformers_loading import capture_skeleton
from moe_offload.offload.dense_linears import dense_linear_format
from moe_offload.offload.experts.containers import find_expert_containers
from moe_offload.offload.freed_memory import give_freed_memory_back
from moe_offload.offload.home import packs_dir
from moe_offload.offload.pack.manifest import LayerLayout, PartSpec, is_pack, read_manifest
from moe_offload.offload.pack.mixed import MIXED, canonical, mixed_bits, weight_formats
from moe_offload.offload.pack.outline import PackOutline, outline_pack
from moe_offload.offload.pack.room import check_room
from moe_offload.offload.pack.share import Share
from moe_offload.offload.pack.writer import PackWriter
from moe_offload.offload.progress import NULL_PROGRESS, ProgressSink
from moe_offload.quant import format_names, get_format

AUTO = "auto"
SOURCE = "source"
DEFAULT_FORMAT = "nf4"
WINDOW_BYTES = 512 << 20
_RAW_FORMATS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def _raw_format(dtype: torch.dtype, name: str) -> str:
    if dtype not in _RAW_FORMATS:
        raise FormatError(f"{name} is {dtype} in the checkpoint: a pack's source format holds fp32, fp16 and bf16")
    return _RAW_FORMATS[dtype]


_Part = tuple[str, tuple[int, ...], str, int]  # name, shape, format, bytes


@dataclass(frozen=True)
class _PartPlan:
    """How one parameter becomes parts: a single one, or the pieces of a quantised source that keep their bits."""

    source: ExpertParamSource
    parts: tuple[PartSpec, ...]
    exact: bool


def _exact_pieces(plan: ConversionPlan, source: ExpertParamSource, spec: str) -> list[Packed] | None:
    """A weight of the first expert as the checkpoint has it quantised, if the pack is to keep those bits."""
    if len(source.param.shape) == 1 or not plan.checkpoint.is_coded(source.first_key):
        return None
    pieces = source.read_exactly(plan.checkpoint, 0)
    if pieces is None or (spec != SOURCE and {piece.format for piece in pieces} != {spec}):
        return None
    return pieces


def _plan_parts(
    plan: ConversionPlan, layer_idx: int, formats: Mapping[str, str]
) -> tuple[list[_PartPlan], LayerLayout]:
    """Layout of one layer's experts, given the format of each matrix.

    Pieces of a fused parameter are parts ``name#0``, ``name#1``, stacked by rows.
    """
    described: list[tuple[ExpertParamSource, bool, list[_Part]]] = []
    for source in plan.experts[layer_idx]:
        param = source.param
        spec = formats.get(param.part, SOURCE)  # vectors stay as they are
        pieces = _exact_pieces(plan, source, spec)
        if pieces is not None:
            names = [param.part] if len(pieces) == 1 else [f"{param.part}#{i}" for i in range(len(pieces))]
            parts: list[_Part] = [
                (name, piece.shape, piece.format, piece.data.numel()) for name, piece in zip(names, pieces, strict=True)
            ]
        else:
            if spec == SOURCE:
                spec = _raw_format(source.dtype(plan.checkpoint), param.target)
            parts = [(param.part, param.packed_shape, spec, get_format(spec).nbytes(param.packed_shape))]
        described.append((source, pieces is not None, parts))
    container = plan.containers[layer_idx]
    every_part = [part for _, _, parts in described for part in parts]
    layout = LayerLayout.of(container.name, container.num_experts, every_part)
    by_name = {part.name: part for part in layout.parts}
    planned = [
        _PartPlan(source, tuple(by_name[name] for name, *_ in parts), exact) for source, exact, parts in described
    ]
    return planned, layout


def _packed_parts(plan: ConversionPlan, part_plan: _PartPlan, expert_idx: int) -> list[torch.Tensor]:
    """The packed bytes of one expert's parts."""
    if part_plan.exact:
        pieces = part_plan.source.read_exactly(plan.checkpoint, expert_idx)
        if pieces is None or [p.format for p in pieces] != [p.format for p in part_plan.parts]:
            raise SourceError(f"expert {expert_idx} of {part_plan.source.param.target} is stored unlike expert 0")
        return [piece.data for piece in pieces]
    (part,) = part_plan.parts
    value = part_plan.source.read(plan.checkpoint, expert_idx, plan.one_expert_model)
    try:
        return [get_format(part.format).quantize(value)]
    except FormatError as error:
        raise FormatError(f"expert {expert_idx} of {part_plan.source.param.target}: {error}") from error


def _build_expert(plan: ConversionPlan, planned: list[_PartPlan], slot_bytes: int, expert_idx: int) -> torch.Tensor:
    """The bytes of one expert, ``uint8 [slot_bytes]``, zero where there is padding. Holds one part beside them."""
    blob = torch.zeros(slot_bytes, dtype=torch.uint8)
    for part_plan in planned:
        packed = _packed_parts(plan, part_plan, expert_idx)
        for part in part_plan.parts:
            blob[part.offset_bytes : part.offset_bytes + part.size_bytes] = packed.pop(0)
    return blob


def _layer_keys(plan: ConversionPlan, layer_idx: int) -> list[str]:
    """The checkpoint's keys of all experts of a layer."""
    return [key for source in plan.experts[layer_idx] for key in source.source.all_keys()]


def _expert_bytes(plan: ConversionPlan, layer_idx: int) -> int:
    """Bytes of one expert of a layer, unquantised."""
    num_weights = sum(torch.Size(source.param.shape).numel() for source in plan.experts[layer_idx])
    return num_weights * int(plan.skeleton.model.dtype.itemsize)


def _write_layer(
    plan: ConversionPlan,
    layer_idx: int,
    formats: Mapping[str, str],
    share: Share | None,
    writer: PackWriter,
    progress: ProgressSink,
) -> None:
    plan.checkpoint.fetch(_layer_keys(plan, layer_idx))
    planned, layout = _plan_parts(plan, layer_idx, formats)
    expert_bytes = _expert_bytes(plan, layer_idx)
    ahead = 2 if 4 * expert_bytes <= WINDOW_BYTES else 1  # an expert takes about twice its size while it is converted
    held = None if share is None else share.held(layout.num_experts)
    expert_ids = range(layout.num_experts) if held is None else held
    with writer.layer(layer_idx, layout, held) as layer, ThreadPoolExecutor(ahead) as pool:
        building: list[Future[torch.Tensor]] = []
        for place in range(len(expert_ids) + ahead):
            if place < len(expert_ids):
                building.append(pool.submit(_build_expert, plan, planned, layout.slot_bytes, expert_ids[place]))
            if place >= ahead - 1 and building:
                # Not kept by a name: the next expert is built before this one would be forgotten.
                layer.write_expert(expert_ids[place - ahead + 1], building.pop(0).result().numpy().data)
                progress.advance(expert_bytes)


def _dense_bytes(plan: ConversionPlan, indices: Iterable[int]) -> int:
    """Bytes of dense parameters, unquantised."""
    state = plan.skeleton.model.state_dict()
    targets = {target for index in indices for target in plan.dense[index].targets()}
    num_weights: int = sum(state[target].numel() for target in targets if target in state)
    return num_weights * int(plan.skeleton.model.dtype.itemsize)


def _write_dense(
    plan: ConversionPlan, shard: int, indices: list[int], dense_format: str, writer: PackWriter, progress: ProgressSink
) -> None:
    """The dense parameters whose last piece lies in ``shard``, streamed into one file."""
    name = f"dense-{shard:05d}.safetensors"
    if name in writer.done_dense():
        progress.advance(_dense_bytes(plan, indices))
        return

    def tensors() -> Iterator[tuple[str, str, tuple[int, ...], memoryview]]:
        for index in indices:
            for key, value in plan.read_dense(plan.dense[index]).items():
                spec = dense_linear_format(plan.skeleton.model, key, dense_format)
                data = value.contiguous() if spec is None else get_format(spec).quantize(value)
                raw = data.reshape(-1).view(torch.uint8).numpy().data
                yield key, DTYPE_NAMES[data.dtype], tuple(data.shape), raw
                progress.advance(value.numel() * int(plan.skeleton.model.dtype.itemsize))

    writer.dense_file(name, tensors())


def _num_held(plan: ConversionPlan, layer_idx: int, share: Share | None) -> int:
    num_experts = plan.containers[layer_idx].num_experts
    return num_experts if share is None else len(share.held(num_experts))


def _dense_of(plan: ConversionPlan, share: Share | None) -> list[tuple[int, ParamSource]]:
    """The dense parameters of a pack: of shares but rank 0's, which runs the model, only those inside the experts."""
    if share is None or share.rank == 0:
        return list(enumerate(plan.dense))
    inside = tuple(f"{container.name}." for container in plan.containers)
    return [(index, source) for index, source in enumerate(plan.dense) if source.target.startswith(inside)]


def _pack(
    plan: ConversionPlan,
    writer: PackWriter,
    formats: Sequence[Mapping[str, str]],
    dense_format: str,
    share: Share | None,
    progress: ProgressSink,
) -> None:
    """Everything of the checkpoint, by the last shard that each part needs."""
    dense_by_shard: dict[int, list[int]] = {}
    for index, source in _dense_of(plan, share):
        dense_by_shard.setdefault(plan.checkpoint.last_shard(source.all_keys()), []).append(index)
    layers_by_shard: dict[int, list[int]] = {}
    for layer_idx in range(len(plan.experts)):
        last_shard = plan.checkpoint.last_shard(_layer_keys(plan, layer_idx))
        layers_by_shard.setdefault(last_shard, []).append(layer_idx)
    done_layers = writer.done_layers()
    plan.checkpoint.done(plan.unused_keys)
    for shard in range(len(plan.checkpoint.shards.names)):
        indices = dense_by_shard.get(shard, [])
        if indices:
            _write_dense(plan, shard, indices, dense_format, writer, progress)
            plan.checkpoint.done([key for index in indices for key in plan.dense[index].all_keys()])
        for layer_idx in layers_by_shard.get(shard, []):
            if layer_idx in done_layers:
                progress.advance(_expert_bytes(plan, layer_idx) * _num_held(plan, layer_idx, share))
            else:
                _write_layer(plan, layer_idx, formats[layer_idx], share, writer, progress)
            plan.checkpoint.done(_layer_keys(plan, layer_idx))


def _dtype_of(config: PreTrainedConfig) -> torch.dtype:
    """The dtype the empty model is built in; its parameters' values come from the checkpoint in theirs."""
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def _check_formats(format: str, dense_format: str) -> None:
    if mixed_bits(format) is None and format not in (AUTO, SOURCE, *format_names()):
        names = ", ".join((AUTO, SOURCE, *format_names(), MIXED))
        raise ConfigError(f"no format {format!r}; there are: {names}")
    if dense_format not in (SOURCE, *format_names()):
        raise ConfigError(f"no dense format {dense_format!r}; there are: source, {', '.join(format_names())}")


def _config_of(name: str, config_folder: Path) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(config_folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UnsupportedModelError(f"transformers cannot build the model of {name}: {reason}") from error


def plan_packing(name: str, config_folder: Path, shard_source: ShardSource) -> ConversionPlan:
    """Everything that is known of a checkpoint before its weights are read."""
    config = _config_of(name, config_folder)
    settings = getattr(config, "quantization_config", None)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the codec reads the quantised weights; the model is the plain one
    skeleton = capture_skeleton(str(config_folder), config, _dtype_of(config))
    containers = find_expert_containers(skeleton.model)
    shards = Shards(shard_source)
    return plan_conversion(skeleton, containers, Checkpoint(shards, codec_for(shards, settings)))


def _total_bytes(plan: ConversionPlan, source: CheckpointSource, share: Share | None) -> int:
    """For the progress bar: bytes to download, and of the model unquantised, from its shapes."""
    expert_bytes = sum(_expert_bytes(plan, i) * _num_held(plan, i, share) for i in range(len(plan.containers)))
    dense_bytes = _dense_bytes(plan, (index for index, _ in _dense_of(plan, share)))
    return dense_bytes + expert_bytes + source.shards.download_bytes


def pack_model(
    model: str,
    output: Path | None = None,
    *,
    name: str | None = None,
    format: str = AUTO,
    dense_format: str = SOURCE,
    revision: str | None = None,
    token: str | None = None,
    share: Share | None = None,
    progress: ProgressSink = NULL_PROGRESS,
    check: Callable[[PackOutline], None] | None = None,
) -> Path:
    """Pack the checkpoint ``model``, a folder or a hub id, into ``output`` (by default under the cache folder).

    Resumes a pack that was interrupted with the same settings, and leaves one that is finished as it is. Returns the
    folder of the pack. ``name`` is what the pack calls its source, by default the hub id or the folder's path.
    ``check`` may refuse the pack to come, by raising, before weights are downloaded or read; it is not asked where the
    sizes are not known by then, in a quantised checkpoint that keeps its bits. A disk without room for the pack is
    refused then too, except with the format ``source``. ``share``: only that rank's experts, and the dense part for
    rank 0 alone.
    Raises `SourceError`, `UnsupportedModelError`, `FormatError`, `DiskFullError` or `ConfigError`.
    """
    _check_formats(format, dense_format)
    give_freed_memory_back()
    source = open_source(model, revision=revision, token=token)
    # ``auto`` keeps the bits of a quantised checkpoint.
    expert_format = canonical(format) if format != AUTO else SOURCE if source.is_quantized else DEFAULT_FORMAT
    folder = output or packs_dir() / pack_name(source, expert_format, dense_format, share)
    if _is_finished(folder, source, expert_format, dense_format, share):
        return folder
    plan = plan_packing(source.name, source.config_folder, source.shards)
    formats = weight_formats(plan.containers, expert_format)
    if not (source.is_quantized and expert_format == SOURCE):
        outline = outline_pack(plan, expert_format, dense_format, SOURCE)
        if check is not None:
            check(outline)
        if expert_format != SOURCE:  # else the checkpoint's dtypes decide, which may not be the model's
            check_room(folder, outline, share)
    name = name or source.name
    identity = {
        "source": name,
        "revision": source.revision or "",
        "fingerprint": source.fingerprint,
        "expert_format": expert_format,
        "dense_format": dense_format,
        "version": VERSION,
    } | ({} if share is None else {"share": str(share)})
    try:
        with PackWriter(folder, identity=identity) as writer:
            doing = "downloading and packing" if source.shards.download_bytes else "packing"
            progress.start(f"{doing} {name} to {expert_format}", _total_bytes(plan, source, share))
            source.shards.on_bytes = progress.advance
            _pack(plan, writer, formats, dense_format, share, progress)
            for path in source.small_files():
                writer.copy_file(path)
            writer.finish(
                source=name,
                revision=source.revision,
                expert_format=expert_format,
                dense_format=dense_format,
                created_by=f"moe-offload {VERSION}",
                extra={"fingerprint": source.fingerprint},
            )
    finally:
        plan.checkpoint.shards.close()
        progress.finish()
    return folder


def _is_finished(
    folder: Path, source: CheckpointSource, expert_format: str, dense_format: str, share: Share | None
) -> bool:
    """Whether the folder holds the pack of this very checkpoint in these formats."""
    if not is_pack(folder):
        return False
    manifest = read_manifest(folder)
    found = (manifest.extra.get("fingerprint"), manifest.expert_format, manifest.dense_format)
    held = [None if share is None else share.held(layer.num_experts) for layer in manifest.layers]
    return (
        found == (source.fingerprint, expert_format, dense_format) and [layer.held for layer in manifest.layers] == held
    )


def pack_name(source: CheckpointSource, expert_format: str, dense_format: str, share: Share | None = None) -> str:
    """A folder name that tells the model, its state, the formats, and whose share it is."""
    stem = "".join(c if c.isalnum() or c in "-._" else "-" for c in source.name.strip("/")).strip("-.")
    dense = "" if dense_format == SOURCE else f"-dense-{dense_format}"
    part = "" if share is None else f"-share-{share.rank}-of-{share.num_ranks}"
    return f"{stem[-80:]}-{source.fingerprint[:12]}-{expert_format.replace(':', '-')}{dense}{part}"
