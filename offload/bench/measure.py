"""One run of one setting: load, decode, count. As a module it is a process of its own, told a `Job` as JSON."""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moe_offload.errors import MoeOffloadError
from moe_offload.offload.bench.forced_routing import ForcedRouting
from moe_offload.offload.bench.rates import expert_read_rate, kernel_read_rate, matrix_rate
from moe_offload.offload.bench.report import MachineRates, RunFigures
from moe_offload.offload.bench.routing import Target
from moe_offload.offload.bench.routing_syntax import make_routing
from moe_offload.offload.bench.settings import Job, Workload
from moe_offload.offload.bench.traffic import prompt_operations, routed_expert_bytes, token_traffic
from moe_offload.offload.dense_weights import DenseWeights
from moe_offload.offload.experts.lookahead import Lookahead
from moe_offload.offload.first_use import pack_config
from moe_offload.offload.freed_memory import give_freed_memory_back, keep_few_kernels
from moe_offload.offload.model import OffloadedModel
from moe_offload.offload.pack.manifest import PackManifest, read_manifest
from moe_offload.offload.pack.share import Share
from moe_offload.offload.pack.shared_out import shape_of_share
from moe_offload.offload.planning.memory import peak_rss_bytes, reset_peak_rss, rss_bytes
from moe_offload.offload.planning.plan import make_plan
from moe_offload.offload.planning.workspace import experts_per_token
from moe_offload.offload.reports import RunReport
from moe_offload.offload.row_embedding import table_in_pack

if TYPE_CHECKING:
    from moe_offload.offload.parallel.group import ExpertGroup

_UNLIMITED_BYTES = 1 << 60
_POLL_S, _STUCK_S = 0.005, 5.0


def measure(job: Job, group: "ExpertGroup | None" = None) -> RunFigures:
    """Run the job in this process; the rates are measured before the model is loaded and after it is closed.

    ``group``: its other ranks are in `serve_run`; counts are of all of them.
    """
    workload, folder = job.workload, Path(job.pack)
    if workload.threads is not None:
        torch.set_num_threads(workload.threads)
    give_freed_memory_back()
    keep_few_kernels()
    manifest, config = read_manifest(folder), pack_config(folder)
    rates = _rates(job, manifest, config)
    share = None if group is None else group.share
    ram = job.setting.ram if job.setting.resident is None else _ram_bytes(folder, manifest, config, job, share)
    base_bytes = rss_bytes()
    has_peak = reset_peak_rss()
    begin_s = time.perf_counter()
    with OffloadedModel.from_pretrained(
        folder,
        device="cpu",
        ram=ram or "auto",
        context_tokens=workload.context_tokens,
        policy=job.setting.policy,
        prefetch=job.setting.prefetch,
        warm_start=False,  # what one run found hot must not help the next
        trace=job.trace,
        group=group,
    ) as model:
        load_s = time.perf_counter() - begin_s
        note = _force_routing(model, job)
        fill_slots(model)
        counts = _prefill(model, workload) if workload.kind == "prefill" else _decode(model, workload, job.repeat)
        context_tokens = workload.context_tokens - workload.new_tokens // 2
        traffic = token_traffic(model.model, model.manifest, context_tokens=context_tokens)
        operations = prompt_operations(model.model, model.manifest, workload.prompt_tokens)
        peak_bytes = (peak_rss_bytes() or 0) - base_bytes if has_peak else None
        plan, cache = model.plan, model._residency.cache
        num_slots = sum(map(cache.num_slots, range(cache.num_layers)))  # some may have given way to the text
    return RunFigures(
        routing=note,
        ram_bytes=plan.ram_bytes,
        resident_share=num_slots / sum(plan.num_experts),
        load_s=load_s,
        peak_bytes=peak_bytes,
        expert_bytes_per_token=traffic.expert_bytes,
        dense_bytes_per_token=traffic.dense_bytes,
        kv_bytes_per_token=traffic.kv_bytes,
        operations=operations if workload.kind == "prefill" else None,
        rates=rates.best(_rates(job, manifest, config)),
        num_ranks=1 if group is None else group.place.num_ranks,
        **counts,
    )


def serve_run(job: Job, group: "ExpertGroup") -> None:
    """On other ranks than 0, while it measures: hold this rank's experts, under a budget of this rank's own."""
    from moe_offload.offload.parallel.loading import serve_experts

    folder, setting = Path(job.pack), job.setting
    if job.workload.threads is not None:
        torch.set_num_threads(job.workload.threads)
    ram = setting.ram
    if setting.resident is not None:
        ram = _ram_bytes(folder, read_manifest(folder), pack_config(folder), job, group.share)
    serve_experts(
        folder,
        group,
        device="cpu",
        ram=ram or "auto",
        context_tokens=job.workload.context_tokens,
        policy=setting.policy,
        prefetch=setting.prefetch,
        warm_start=False,
    )


def _force_routing(model: OffloadedModel, job: Job) -> str:
    """Make the model decode along the workload's routing; what it is, in words."""
    workload, config, layers = job.workload, model.model.config, model.manifest.layers
    num_experts = {layer.num_experts for layer in layers}
    target = Target(
        workload.warmup_tokens + workload.new_tokens,
        len(layers),
        min(num_experts),
        experts_per_token(config.get_text_config(decoder=True)),
    )
    routing = make_routing(workload.routing, target, seed=workload.seed)
    if routing is None:
        return "by the model"
    modules = [layer.module for layer in layers]
    forced = ForcedRouting(
        model.model, modules, target.num_experts, routing, recall=workload.recall, seed=workload.seed
    )
    lookahead = model._step.predictor
    if isinstance(lookahead, Lookahead):
        lookahead.replace_guesses(forced.guess)
    return routing.note


def fill_slots(model: OffloadedModel) -> None:
    """Read experts into every slot, so that no run is timed while its cache is still empty."""
    residency, cache = model._residency, model._residency.cache
    for layer_idx, num_slots in enumerate(model.plan.num_slots):
        if (peers := residency.peers) is None:
            residency.prefetch(layer_idx, range(num_slots))
            continue
        everyone = range(cache.num_experts(layer_idx))
        here = [expert_idx for expert_idx in everyone if peers.is_here(expert_idx)]
        elsewhere = [expert_idx for expert_idx in everyone if not peers.is_here(expert_idx)]
        residency.prefetch(layer_idx, here[:num_slots] + elsewhere)
    progress_bytes, since_s = -1, time.perf_counter()
    while sum(len(cache.resident(layer_idx)) for layer_idx in range(cache.num_layers)) < sum(model.plan.num_slots):
        if (bytes_read := model._residency.bytes_read) > progress_bytes:
            progress_bytes, since_s = bytes_read, time.perf_counter()
        elif time.perf_counter() - since_s > _STUCK_S:  # a failed read; decoding will meet it and say so
            return
        time.sleep(_POLL_S)


def _decode(model: OffloadedModel, workload: Workload, repeat: int) -> dict[str, Any]:
    """A prompt, warm-up tokens, and the tokens that count."""
    times_s: list[float] = []
    first = 1 + workload.warmup_tokens  # the prompt gives the first token
    marks: list[Any] = []

    def watch(num_tokens: int) -> None:
        times_s.append(time.perf_counter())
        if num_tokens in (first, first + workload.new_tokens):
            marks.append(model._meter.read())

    token_ids = _random_ids(model, first + workload.new_tokens, workload.seed + 1)
    prompt_ids = torch.tensor([_random_ids(model, workload.prompt_tokens, workload.seed)])
    whole = model._generator.replay(prompt_ids, token_ids, watch)
    report = model._meter.between(*marks)
    steps_s = [after - before for before, after in zip(times_s[first - 1 :], times_s[first:], strict=False)]
    return _counts(report) | {
        "time_to_first_token_s": whole.time_to_first_token_s,
        "tokens": workload.new_tokens,
        "elapsed_s": times_s[-1] - times_s[first - 1],
        "median_step_s": statistics.median(steps_s),
    }


def _prefill(model: OffloadedModel, workload: Workload) -> dict[str, Any]:
    """Two prompts to their first token, of which the second counts: by then the cache is full."""
    for seed in (workload.seed, workload.seed + 1):
        prompt_ids = torch.tensor([_random_ids(model, workload.prompt_tokens, seed)])
        report = model._generator.replay(prompt_ids, _random_ids(model, 1, seed), lambda num_tokens: None)
    return _counts(report) | {
        "time_to_first_token_s": report.time_to_first_token_s,
        "tokens": workload.prompt_tokens,
        "elapsed_s": report.time_to_first_token_s,
        "median_step_s": None,
    }


def _counts(report: RunReport) -> dict[str, Any]:
    names = ["hit_ratio", "bytes_read", "stall_s", "prefetch_recall", "prefetch_issued", "prefetch_wasted"]
    names += ["peer_wait_s", "peer_bytes"]
    needed_bytes = max(0, report.bytes_read - report.prefetch_wasted_bytes)
    return {name: getattr(report, name) for name in names} | {"bytes_missed": needed_bytes}


def _random_ids(model: OffloadedModel, count: int, seed: int) -> list[int]:
    """Tokens of the vocabulary, none of which ends a text."""
    vocabulary = int(model.model.config.get_text_config(decoder=True).vocab_size)
    ends = model.model.generation_config.eos_token_id
    ending = {ends} if isinstance(ends, int) else set(ends or ())
    ids = torch.randint(vocabulary, (2 * count + 16,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [token_id for token_id in ids if token_id not in ending][:count]


def _rates(job: Job, manifest: PackManifest, config: Any) -> MachineRates:
    disk, direct = expert_read_rate(manifest, Path(job.pack), seed=job.repeat, longest_s=job.disk_s)
    memory = kernel_read_rate(routed_expert_bytes(manifest, config) + manifest.dense_bytes)
    matrix = None
    if job.workload.kind == "prefill":
        shape = max(part.shape for layer in manifest.layers for part in layer.parts if len(part.shape) == 2)
        matrix = matrix_rate(job.workload.prompt_tokens, (shape[0], shape[1]))
    return MachineRates(memory.bytes_per_s, disk.bytes_per_s, direct, matrix)


def _ram_bytes(folder: Path, manifest: PackManifest, config: Any, job: Job, share: Share | None = None) -> int:
    """The budget with which the part of every layer's experts that the setting asks for is resident while decoding.

    Where that is all of them, it is so in a prompt too. ``share``: of this rank's experts.
    """
    assert job.setting.resident is not None
    dtype = config.dtype or torch.bfloat16
    shape = shape_of_share(manifest, share)
    holds_only_experts = share is not None and share.rank > 0
    with DenseWeights(folder, manifest) as dense:
        table = table_in_pack(config, dense.keys(), "cpu")
        plan = make_plan(
            shape,
            config,
            device="cpu",
            ram_bytes=_UNLIMITED_BYTES,
            vram_bytes=None,
            context_tokens=job.workload.context_tokens,
            dtype_bytes=4 if holds_only_experts else dtype.itemsize,
            top_k_per_layer=[experts_per_token(config.get_text_config(decoder=True))] * len(manifest.layers),
            resident_dense_bytes=0 if holds_only_experts else dense.resident_bytes(dtype, without=table),
            experts_only=holds_only_experts,
        )
    num_slots = [max(1, round(job.setting.resident * layer.num_experts)) for layer in shape.layers]
    slots_bytes = sum(layer.slot_bytes * slots for layer, slots in zip(shape.layers, num_slots, strict=True))
    least_bytes = sum(layer.slot_bytes for layer in shape.layers)
    if num_slots != [layer.num_experts for layer in shape.layers] and plan.least_room is not None:
        slots_bytes = max(least_bytes, slots_bytes - (plan.room.total_bytes - plan.least_room.total_bytes))
    return plan.total_bytes("RAM") - plan.slots_bytes(range(len(num_slots))) + slots_bytes


def main() -> None:
    """Read a job from the standard input; write its figures, or the error that a user can act on, to the output."""
    job = Job.from_dict(json.load(sys.stdin))
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        answer: dict[str, Any] = {"run": measure(job).to_dict()}
    except MoeOffloadError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
