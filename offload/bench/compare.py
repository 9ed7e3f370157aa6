"""Runs settings against each other: A B A B, each run in a process of its own."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_offload._version import VERSION
from moe_offload.errors import ConfigError, MoeOffloadError
from moe_offload.offload.bench.report import BenchReport, PackFigures, Row, RunFigures
from moe_offload.offload.bench.settings import DISK_S, Job, Setting, Workload

if TYPE_CHECKING:
    from moe_offload.offload.parallel.group import ExpertGroup

OnRun = Callable[[Setting, RunFigures], None]


def run(
    pack: Path,
    settings: Sequence[Setting],
    workload: Workload,
    *,
    name: str | None = None,
    repeat: int = 1,
    isolated: bool = True,
    on_run: OnRun | None = None,
    trace: Path | None = None,
    group: "ExpertGroup | None" = None,
    launcher: Sequence[str] = (),
    disk_s: float = DISK_S,
) -> BenchReport:
    """Measure every setting ``repeat`` times, all of them once before any of them again.

    ``isolated``: each run in a fresh process, so that none profits from another's memory; else in this one. ``on_run``
    is told each run's figures as they come. ``trace``: record each run to this file, or to files beside it that begin
    with its name if there are several runs. ``group``: the others of it call `serve_runs` meanwhile; all runs are in
    this process then. ``launcher``: put before the command of every isolated run, as one that enters a control group.
    ``disk_s``: how long the disk's rate is measured, twice in every run. Raises what loading a model raises; a child's
    errors as `MoeOffloadError` with its message.
    """
    if not settings:
        raise ConfigError("there is nothing to measure: give a budget")
    if repeat < 1:
        raise ConfigError(f"repeat is {repeat}; it must be 1 or more")
    runs: list[list[RunFigures]] = [[] for _ in settings]
    for index in range(repeat):
        for line, (figures, setting) in enumerate(zip(runs, settings, strict=True)):
            recorded = trace
            if trace is not None and len(settings) * repeat > 1:
                recorded = trace.with_name(f"{trace.stem}-{line + 1}-{index + 1}{trace.suffix}")
            job = Job(str(pack), setting, workload, index, None if recorded is None else str(recorded), disk_s)
            figures.append(_run_isolated(job, launcher) if isolated and group is None else _run_here(job, group))
            if on_run is not None:
                on_run(setting, figures[-1])
    rows = tuple(Row(setting, tuple(figures)) for setting, figures in zip(settings, runs, strict=True))
    return BenchReport(_machine(workload), _pack_figures(pack, name or pack.name), workload, rows)


def serve_runs(
    pack: Path, settings: Sequence[Setting], workload: Workload, group: "ExpertGroup", *, repeat: int = 1
) -> None:
    """On other ranks than 0: hold this rank's experts for every run that rank 0 makes."""
    from moe_offload.offload.bench.measure import serve_run

    for index in range(repeat):
        for setting in settings:
            serve_run(Job(str(pack), setting, workload, index), group)


def _run_here(job: Job, group: "ExpertGroup | None" = None) -> RunFigures:
    from moe_offload.offload.bench.measure import measure

    return measure(job, group)


def _run_isolated(job: Job, launcher: Sequence[str] = ()) -> RunFigures:
    command = [*launcher, sys.executable, "-m", "moe_offload.offload.bench.measure"]
    done = subprocess.run(command, input=json.dumps(job.to_dict()), capture_output=True, text=True, check=False)
    if done.returncode:
        why = "it was killed, probably for want of memory" if done.returncode == -9 else done.stderr.strip()[-2000:]
        raise MoeOffloadError(f"a run ended with status {done.returncode}: {why}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "error" in answer:
        raise MoeOffloadError(answer["error"])
    return RunFigures.from_dict(answer["run"])


def _machine(workload: Workload) -> dict[str, Any]:
    import torch

    from moe_offload.quant import backend_name

    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": workload.threads or torch.get_num_threads(),
        "kernels": backend_name(),
        "torch": torch.__version__,
        "moe_offload": VERSION,
    }


def _pack_figures(pack: Path, name: str) -> PackFigures:
    from moe_offload.offload.first_use import pack_config
    from moe_offload.offload.pack.manifest import read_manifest
    from moe_offload.offload.planning.workspace import experts_per_token

    manifest = read_manifest(pack)
    return PackFigures(
        name=name,
        folder=str(pack),
        format=manifest.expert_format,
        dense_format=manifest.dense_format,
        layers=len(manifest.layers),
        experts=max(layer.num_experts for layer in manifest.layers),
        top_k=experts_per_token(pack_config(pack).get_text_config(decoder=True)),
        expert_bytes=max(sum(part.size_bytes for part in layer.parts) for layer in manifest.layers),
        all_expert_bytes=manifest.expert_bytes,
        dense_bytes=manifest.dense_bytes,
    )
