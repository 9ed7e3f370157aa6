"""From a checkpoint's keys to a model's parameters, one expert or one dense parameter at a time.

transformers renames every key and merges some into fused parameters (`core_model_loading`). The same transforms run
here on a view of the model that has a single expert, so that no more than one expert is ever held unquantised.
"""

import copy
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    dot_natural_key,
    rename_source_key,
)

from moe_offload.errors import SourceError
from moe_offload.offload.checkpoint.shards import Shards
from moe_offload.offload.checkpoint.source_quantization import Codec, Packed
from moe_offload.offload.checkpoint.transformers_loading import Skeleton
from moe_offload.offload.experts.containers import ExpertContainer, ExpertParam


class Checkpoint:
    """A checkpoint's tensors by plain name, whether it is quantised or not."""

    def __init__(self, shards: Shards, codec: Codec | None) -> None:
        self.shards = shards
        self._codec = codec
        self._members: dict[str, list[str]] = defaultdict(list)
        for key in shards.shard_of:
            self._members[codec.plain_key(key) if codec else key].append(key)

    def plain_keys(self) -> list[str]:
        """Plain names, in natural order."""
        return sorted(self._members, key=dot_natural_key)

    def is_coded(self, key: str) -> bool:
        """Whether the tensor is stored quantised."""
        return self._codec is not None and bool(self._codec.members(key))

    def last_shard(self, keys: Sequence[str]) -> int:
        """The position of the last shard that holds a part of ``keys``."""
        return max(self.shards.shard_of[member] for key in keys for member in self._members[key])

    def fetch(self, keys: Sequence[str]) -> None:
        """Bring here what ``keys`` are read from."""
        self.shards.fetch(member for key in keys for member in self._members[key])

    def read(self, key: str, rows: slice | None = None) -> torch.Tensor:
        """The values of a tensor, or of some leading rows."""
        if self._codec is not None and self._codec.members(key):
            return self._codec.decode(key, rows)
        return self.shards.read(key, rows)

    def encode_exactly(self, key: str, row: int | None, *, transposed: bool) -> Packed | None:
        """The bits of a quantised tensor in one of our formats, ``[out, in]``, where one holds them."""
        if self._codec is None or not self.is_coded(key):
            return None
        return self._codec.encode_exactly(key, row, transposed=transposed)

    def dtype(self, key: str) -> torch.dtype:
        """The dtype that `read` gives."""
        if self._codec is not None and self.is_coded(key):
            return self._codec.dtype(key)
        return self.shards.entry(key).dtype

    def done(self, keys: Sequence[str]) -> None:
        """These tensors are not needed again."""
        self.shards.done(member for key in keys for member in self._members[key])


class _OneExpertModel:
    """What a conversion operation may ask of a model, as if every container had exactly one expert."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], config: Any) -> None:
        self._shapes, self.config = shapes, config

    def get_parameter_or_buffer(self, name: str) -> torch.Tensor:
        return torch.empty((1, *self._shapes[name]), device="meta")

    get_parameter = get_parameter_or_buffer

    def get_submodule(self, prefix: str) -> SimpleNamespace:
        names = [name for name in self._shapes if name.rpartition(".")[0] == prefix]
        return SimpleNamespace(**{name.rpartition(".")[2]: self.get_parameter_or_buffer(name) for name in names})


def _converted(converter: WeightConverter, target: str, tensors: dict[str, list[torch.Tensor]], model: Any) -> Any:
    """Run a converter on its own copy, since it collects tensors in itself (the operations hold no state)."""
    own = copy.copy(converter)
    own.collected_tensors, own.layer_targets = defaultdict(list), defaultdict(set)
    for pattern, values in tensors.items():
        for value in values:
            own.add_tensor(target, pattern, pattern, value)
    return own.convert(target, model=model, config=model.config)


@dataclass
class ParamSource:
    """The checkpoint keys of one model parameter: by source pattern, in natural order."""

    target: str
    converter: WeightConverter | None = None
    keys: dict[str, list[str]] = field(default_factory=dict)

    def all_keys(self) -> list[str]:
        """Every key, once."""
        return [key for keys in self.keys.values() for key in keys]

    def targets(self) -> list[str]:
        """The parameter, and those that the same keys are split into."""
        patterns = self.converter.target_patterns if self.converter is not None else []
        return [self.target, *(self.target.replace(patterns[0], pattern) for pattern in patterns[1:])]


@dataclass
class ExpertParamSource:
    """How to obtain one parameter of any expert of a container."""

    param: ExpertParam
    num_experts: int
    source: ParamSource

    def _keys_of(self, expert_idx: int) -> dict[str, tuple[str, int | None]]:
        """Per source pattern: the expert's key, and its row where the key holds all experts."""
        found: dict[str, tuple[str, int | None]] = {}
        for pattern, keys in self.source.keys.items():
            one_each = "*" in pattern or "{expert}" in pattern or len(keys) > 1
            if one_each and len(keys) >= self.num_experts:  # LongCat's identity experts come after the real ones
                found[pattern] = (keys[expert_idx], None)
            elif len(keys) == 1:
                found[pattern] = (keys[0], expert_idx)
            else:
                raise SourceError(
                    f"the checkpoint has {len(keys)} tensors for the {self.num_experts} experts of "
                    f"{self.param.target} ({pattern})"
                )
        return found

    def check_count(self) -> None:
        """`SourceError` unless there is a tensor, or a row of one, for each expert."""
        self._keys_of(self.num_experts - 1)

    def _read(self, checkpoint: Checkpoint, key: str, row: int | None) -> torch.Tensor:
        if row is None:
            return checkpoint.read(key)
        rows = self.param.stacked_rows or 1
        return checkpoint.read(key, slice(row * rows, (row + 1) * rows))

    def read(self, checkpoint: Checkpoint, expert_idx: int, model: _OneExpertModel) -> torch.Tensor:
        """The expert's parameter, ``[out, in]`` or ``[out]``, contiguous, in the checkpoint's dtype."""
        tensors = {p: [self._read(checkpoint, *place)] for p, place in self._keys_of(expert_idx).items()}
        if self.source.converter is None:
            ((value,),) = tensors.values()
        else:
            result = _converted(self.source.converter, self.source.target, tensors, model)
            value = result[self.source.target] if self.source.target in result else next(iter(result.values()))
            value = value[0] if isinstance(value, list) else value
        if value.dim() == len(self.param.shape) + 1 and value.shape[0] == 1:
            value = value[0]
        if tuple(value.shape) != self.param.shape:
            raise self._wrong_shape(expert_idx, str(tuple(value.shape)))
        return value.t().contiguous() if self.param.transposed else value.contiguous()

    def _wrong_shape(self, expert_idx: int, found: str) -> SourceError:
        return SourceError(
            f"expert {expert_idx} of {self.param.target} has shape {found} in the checkpoint, {self.param.shape} in "
            "the model: the weights and the config do not belong together"
        )

    def read_exactly(self, checkpoint: Checkpoint, expert_idx: int) -> list[Packed] | None:
        """The expert's own bits, one piece or several to be stacked by rows; None where they cannot be kept."""
        pieces = [
            checkpoint.encode_exactly(key, row, transposed=self.param.transposed)
            for key, row in self._keys_of(expert_idx).values()
        ]
        converter = self.source.converter
        if converter is not None:
            stacks_rows = [type(op) for op in converter.operations] == [MergeModulelist, Concatenate]
            merges_only = [type(op) for op in converter.operations] == [MergeModulelist] and len(pieces) == 1
            if not merges_only and not (stacks_rows and converter.operations[1].dim == 1):
                return None
            order = list(self._keys_of(expert_idx))
            pieces = [pieces[order.index(p)] for p in converter.source_patterns if p in order]
        whole = [piece for piece in pieces if piece is not None]
        if len(whole) != len(pieces):
            return None
        if {piece.shape[1:] for piece in whole} != {self.param.packed_shape[1:]} or (
            sum(piece.shape[0] for piece in whole) != self.param.packed_shape[0]
        ):
            raise self._wrong_shape(expert_idx, " and ".join(str(piece.shape) for piece in whole))
        return whole

    @property
    def first_key(self) -> str:
        """One of the keys, which stands for the dtype of all."""
        return self.source.all_keys()[0]

    def dtype(self, checkpoint: Checkpoint) -> torch.dtype:
        """The dtype that `read` gives."""
        return checkpoint.dtype(self.first_key)


@dataclass
class ConversionPlan:
    """Every parameter of a model with its sources in a checkpoint."""

    checkpoint: Checkpoint
    skeleton: Skeleton
    containers: list[ExpertContainer]
    experts: list[list[ExpertParamSource]]  # per container
    dense: list[ParamSource]
    unused_keys: list[str]

    def __post_init__(self) -> None:
        shapes = {source.source.target: source.param.shape for sources in self.experts for source in sources}
        self.one_expert_model = _OneExpertModel(shapes, self.skeleton.model.config)

        self._state = self.skeleton.model.state_dict()
        self._check_complete()

    def _check_complete(self) -> None:
        """Every parameter has a source: transformers would fill one that has none with random numbers."""
        kind = type(self.skeleton.model).__name__
        sources = [source for sources in self.experts for source in sources]
        missing = sorted({source.param.target for source in sources if not source.source.keys})
        if missing:
            raise SourceError(
                f"the checkpoint has no weights for {len(missing)} expert parameters of {kind}, first {missing[0]}"
            )
        for source in sources:
            source.check_count()
        found = {target for source in self.dense for target in source.targets()}
        tied = self.skeleton.model.all_tied_weights_keys
        tied_to_found = {name for pair in tied.items() if found & set(pair) for name in pair}
        optional = re.compile("|".join(self.skeleton.model._keys_to_ignore_on_load_missing or ["$^"]))
        experts = tuple(f"{container.name}." for container in self.containers)
        lacking = [
            name
            for name, _ in self.skeleton.model.named_parameters()
            if name not in found | tied_to_found and not name.startswith(experts) and not optional.search(name)
        ]
        if lacking:
            raise SourceError(f"the checkpoint lacks {len(lacking)} weights of {kind}, first {lacking[0]}")

    def read_dense(self, source: ParamSource) -> dict[str, torch.Tensor]:
        """The model's parameters (several where one key is split) by their names in its state dict."""
        if source.converter is None:
            values = {source.target: self.checkpoint.read(source.all_keys()[0])}
        else:
            tensors = {pattern: [self.checkpoint.read(key) for key in keys] for pattern, keys in source.keys.items()}
            result = _converted(source.converter, source.target, tensors, self.skeleton.model)
            values = {name: value[0] if isinstance(value, list) else value for name, value in result.items()}
        for name, value in values.items():
            if name in self._state and value.shape != self._state[name].shape:
                raise SourceError(
                    f"{name} has shape {tuple(value.shape)} in the checkpoint, {tuple(self._state[name].shape)} in the "
                    "model: the weights and the config do not belong together"
                )
        return values


def plan_conversion(skeleton: Skeleton, containers: list[ExpertContainer], checkpoint: Checkpoint) -> ConversionPlan:
    """Map every key of the checkpoint; `SourceError` names parameters that it lacks."""
    model = skeleton.model
    state = model.state_dict()
    by_pattern = {pattern: converter for converter in skeleton.converters for pattern in converter.source_patterns}
    expert_sources: dict[str, ExpertParamSource] = {}
    experts: list[list[ExpertParamSource]] = []
    for container in containers:
        experts.append(
            [ExpertParamSource(param, container.num_experts, ParamSource(param.target)) for param in container.params]
        )
        for expert_source in experts[-1]:
            for expert_idx in range(container.num_experts):
                expert_sources[expert_source.param.target.format(expert=expert_idx)] = expert_source
    dense: dict[str, ParamSource] = {}
    unused = []
    for key in checkpoint.plain_keys():
        target, pattern = rename_source_key(
            key, skeleton.renamings, skeleton.converters, model.base_model_prefix, state
        )
        if target not in state and key in state:
            target, pattern = rename_source_key(key, [], [], model.base_model_prefix, state)
        if target in expert_sources:
            source = expert_sources[target].source
        elif target in state:
            source = dense.setdefault(target, ParamSource(target))
        else:
            unused.append(key)
            continue
        if pattern is not None:
            source.converter = by_pattern[pattern]
        source.keys.setdefault(pattern or source.target, []).append(key)
    return ConversionPlan(checkpoint, skeleton, containers, experts, list(dense.values()), unused)
