"""From a pack to a transformers model whose experts are fetched when they are needed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from moe_offload.cache import ExpertCache
from moe_offload.errors import ConfigError, PackCorruptError
from moe_offload.offload.checkpoint.transformers_loading import build_model
from moe_offload.offload.decode.choice import fuse_decode_step
from moe_offload.offload.dense_linears import replace_packed_linears
from moe_offload.offload.dense_weights import DenseWeights
from moe_offload.offload.device_boundaries import DeviceBoundaries
from moe_offload.offload.experts.containers import ExpertContainer, find_expert_containers
from moe_offload.offload.experts.forwards import IMPLEMENTATION, install_expert_layer, strip_parameters
from moe_offload.offload.experts.layer import ExpertLayer, StepState
from moe_offload.offload.experts.residency import Residency
from moe_offload.offload.pack.manifest import REPACK, PackManifest
from moe_offload.offload.pass_inputs import LONGEST_DRAFT_TOKENS, pass_tokens
from moe_offload.offload.row_embedding import replace_embedding, table_in_pack
from moe_offload.offload.tiers.compute_tier import ComputeTier


@dataclass(frozen=True)
class LoadedModel:
    """A model that runs on a pack."""

    model: Any
    residency: Residency
    step: StepState


def check_containers(containers: Sequence[ExpertContainer], manifest: PackManifest) -> None:
    """The model that transformers builds has the layers that the pack was made for, and experts of the same shapes.

    Kernels read as many numbers as a part's shape says, wherever they end.
    """
    found = [(container.name, container.num_experts) for container in containers]
    packed = [(layer.module, layer.num_experts) for layer in manifest.layers]
    if found != packed:
        odd = next((a, b) for a, b in zip([*found, None], [*packed, None], strict=False) if a != b)
        raise PackCorruptError(
            f"the model has expert layer {odd[0]}, the pack has {odd[1]}: it was made for another model "
            f"or another version of transformers; {REPACK}"
        )
    for container, layer in zip(containers, manifest.layers, strict=True):
        pieces: dict[str, list[tuple[int, ...]]] = {}  # ``name#0``, ``name#1``, ... are stacked by rows
        for part in layer.parts:
            pieces.setdefault(part.name.partition("#")[0], []).append(part.shape)
        needed = {param.part: param.packed_shape for param in container.params}
        for name in needed | pieces:
            if needed.get(name) != _stacked(pieces.get(name, [])):
                given = " and ".join(map(str, pieces.get(name, [None])))
                raise PackCorruptError(
                    f"experts of {layer.module} have {name} of shape {needed.get(name)} in the model, and of {given} "
                    f"in the pack: it was made for another model; {REPACK}"
                )


def _stacked(pieces: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape of a weight cut into pieces by rows; None where there are none, or no weight is cut like that."""
    if len(pieces) == 1:
        return pieces[0]
    if len({shape[1:] for shape in pieces}) != 1 or not all(pieces):
        return None
    return sum(shape[0] for shape in pieces), *pieces[0][1:]


def _refuse_saving(*args: Any, **kwargs: Any) -> NoReturn:
    raise ConfigError(
        "save_pretrained is refused: the experts are not in the model but in the pack, so a part of a model would be "
        "written; copy the pack's folder, or save the checkpoint it was made from"
    )


def _track_phase(model: Any, step: StepState) -> None:
    """Tell the experts whether a forward pass is a prompt: more tokens of a sequence than drafts would bring."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = pass_tokens(args, kwargs)
        step.prefill = tokens is not None and tokens.dim() > 1 and tokens.shape[1] > LONGEST_DRAFT_TOKENS

    model.register_forward_pre_hook(before, with_kwargs=True)
    if model.config.is_encoder_decoder:  # `generate` runs the encoder by itself
        model.get_encoder().register_forward_pre_hook(before, with_kwargs=True)


def load_model(
    folder: str,
    config: Any,
    manifest: PackManifest,
    dense: DenseWeights,
    *,
    cache: ExpertCache,
    tier: ComputeTier,
    dtype: torch.dtype,
    device_map: Mapping[str, torch.device],
) -> LoadedModel:
    """Build the model with its dense weights; its experts come from ``tier`` as ``cache`` decides.

    ``device_map``: where modules go, by name; "" is the model.
    """
    device = next(iter(device_map.values()))
    residency = Residency(cache, tier)
    step = StepState()
    containers: list[ExpertContainer] = []

    def prepare(model: Any) -> Mapping[str, Any]:
        containers.extend(find_expert_containers(model))
        check_containers(containers, manifest)
        renamed = replace_packed_linears(model, manifest.dense_format)
        for container in containers:
            strip_parameters(container)
            # Its own initialisation would reach for the experts' parameters.
            model.get_submodule(container.name.rpartition(".")[0])._is_hf_initialized = True
        table = table_in_pack(config, dense.keys(), device.type)
        if table is not None:
            replace_embedding(model, table, dense.reopened(table), dtype)
        stored = {name: key for name, key in renamed.items() if key in dense}
        plain = {key: dense[key] for key in dense if key not in stored.values() and key != table}
        return plain | {name: dense[key] for name, key in stored.items()}

    model = build_model(
        folder, config, dtype=dtype, device_map=device_map, implementation=IMPLEMENTATION, prepare=prepare
    )
    if len(device_map) > 1:
        DeviceBoundaries(model, device_map)
    for layer_idx, container in enumerate(containers):
        install_expert_layer(container, ExpertLayer(layer_idx, container.num_experts, residency, step))
    missing = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if missing:
        raise PackCorruptError(f"the pack lacks {len(missing)} dense weights, first {missing[0]}; {REPACK}")
    model.requires_grad_(False)  # slots are overwritten: what a backward pass would find in them is not what ran
    model.save_pretrained = model.push_to_hub = _refuse_saving
    fuse_decode_step(model, device)
    _track_phase(model, step)
    return LoadedModel(model, residency, step)
