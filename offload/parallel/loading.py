"""Loads what a rank above 0 needs of a model: its experts, and the code around them; no attention, no embeddings."""

from os import PathLike
from pathlib import Path
from typing import Any

import torch

from moe_offload.cache import DEFAULT_POLICY, LEARNED, ExpertCache
from moe_offload.cache.learned import make_learned_policy
from moe_offload.errors import ConfigError, UnsupportedModelError
from moe_offload.offload.checkpoint.transformers_loading import capture_skeleton
from moe_offload.offload.dense_weights import DenseWeights
from moe_offload.offload.devices import pick_device
from moe_offload.offload.experts.containers import ExpertContainer, find_expert_containers
from moe_offload.offload.experts.forwards import expert_mlp, strip_parameters
from moe_offload.offload.experts.layer import ExpertLayer, StepState
from moe_offload.offload.experts.miss_path import COPY
from moe_offload.offload.experts.prefetch_tuning import parse_prefetch
from moe_offload.offload.experts.residency import Residency
from moe_offload.offload.experts.warm_start import HotSetFile
from moe_offload.offload.first_use import find_pack, pack_config
from moe_offload.offload.freed_memory import give_freed_memory_back, keep_few_kernels
from moe_offload.offload.learning.predictor_file import load_predictor
from moe_offload.offload.loader import check_containers
from moe_offload.offload.pack.manifest import PackManifest, read_manifest
from moe_offload.offload.pack.outline import PackOutline
from moe_offload.offload.pack.shared_out import check_share, shape_of_share
from moe_offload.offload.parallel.group import ExpertGroup
from moe_offload.offload.parallel.serving import ExpertServer
from moe_offload.offload.planning.memory import (
    ram_budget_bytes,
    vram_budget_bytes,
    vram_memory,
)
from moe_offload.offload.planning.plan import PackShape, Plan, make_plan
from moe_offload.offload.planning.vram_option import VramSize, vram_by_device
from moe_offload.offload.planning.workspace import experts_per_token
from moe_offload.offload.progress import ProgressSink
from moe_offload.offload.tiers.choice import make_tier


def serve_experts(
    model: str | PathLike[str],
    group: ExpertGroup,
    *,
    device: str = "auto",
    vram: VramSize = "auto",
    ram: str | int = "auto",
    format: str = "auto",
    dense_format: str = "source",
    dtype: str | torch.dtype = "auto",
    context_tokens: int = 4096,
    policy: str = DEFAULT_POLICY,
    prefetch: str | int = "auto",
    miss_path: str = COPY,
    graphs: str = "auto",
    warm_start: bool = True,
    verify: str = "first",
    revision: str | None = None,
    token: str | None = None,
    pack_dir: str | PathLike[str] | None = None,
    on_progress: ProgressSink | None = None,
) -> None:
    """On a rank above 0: hold this rank's experts for rank 0, which loads the model, until it closes it.

    Arguments as of `OffloadedModel.from_pretrained`, with budgets of this rank's own; ``dtype``, ``miss_path`` and
    ``graphs`` are rank 0's affair: misses here are copied to this rank's GPU.
    """
    del dtype, miss_path, graphs
    if vram_by_device(vram) is not None:
        raise ConfigError("every rank computes on one GPU: give --vram a single amount, or leave out torchrun")
    depth, torch_device = parse_prefetch(prefetch), pick_device(device, group.place.local_rank)

    def plan_for(pack: PackShape, config: Any) -> Plan:
        return make_plan(
            shape_of_share(pack, group.share),
            config,
            device=torch_device.type,  # type: ignore[arg-type]
            ram_bytes=ram_budget_bytes(ram, group.ram),
            vram_bytes=_vram_bytes(vram, torch_device),
            context_tokens=context_tokens,
            dtype_bytes=4,  # rows arrive in rank 0's dtype, which is no wider
            top_k_per_layer=[experts_per_token(config.get_text_config(decoder=True))] * len(pack.layers),
            prefetch_depth=depth,
            resident_dense_bytes=0,
            experts_only=True,
        )

    def check_budget(outline: PackOutline) -> None:
        plan_for(outline, outline.config)

    folder = find_pack(
        model,
        group,
        pack_dir=pack_dir,
        format=format,
        dense_format=dense_format,
        revision=revision,
        token=token,
        progress=on_progress,
        check=check_budget,
    )
    give_freed_memory_back()
    keep_few_kernels()
    manifest = read_manifest(folder)
    check_share(manifest, group.share, folder)
    config = pack_config(folder)
    plan = plan_for(manifest, config)
    group.agree(manifest)
    made = make_learned_policy(load_predictor(folder, manifest)) if policy == LEARNED else policy
    num_experts = [layer.num_experts for layer in manifest.layers]
    cache = ExpertCache(num_experts, plan.num_slots, made)
    containers = _containers(folder, config, manifest, torch_device)
    tier = make_tier(manifest, folder, plan, torch_device, verify)  # type: ignore[arg-type]
    residency, step = Residency(cache, tier), StepState()
    layers = [
        (ExpertLayer(layer_idx, container.num_experts, residency, step), *expert_mlp(container))
        for layer_idx, container in enumerate(containers)
    ]
    hot_set = HotSetFile(folder, num_experts, group.share) if warm_start else None
    with ExpertServer(group, plan, residency, step, layers, torch_device, hot_set) as server:
        server.serve()


def _containers(folder: Path, config: Any, manifest: PackManifest, device: torch.device) -> list[ExpertContainer]:
    """The model's expert modules without their experts; what else is in them (a norm) is read from the pack."""
    model = capture_skeleton(str(folder), config, torch.float32).model
    containers = find_expert_containers(model)
    check_containers(containers, manifest)
    with DenseWeights(folder, manifest) as dense:
        for container in containers:
            strip_parameters(container)
            for name, tensor in container.module.named_parameters():
                key = f"{container.name}.{name}"
                if key not in dense:
                    raise UnsupportedModelError(
                        f"{key} is needed beside the experts and is not in {folder}: use a pack of the whole model"
                    )
                owner = container.module.get_submodule(name.rpartition(".")[0])
                value = dense[key][...].to(device)
                assert value.shape == tensor.shape
                setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(value, requires_grad=False))
    return containers


def _vram_bytes(vram: VramSize, device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    memory = vram_memory(device.index or 0)
    if memory is None:
        raise ConfigError(f"{device} cannot be asked for its memory")
    assert isinstance(vram, str | int), "amounts by device are for several"
    return vram_budget_bytes(vram, memory)
