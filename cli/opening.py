"""Opens a model for a command: progress while it packs and loads, the plan before anything is read, a banner after."""

import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from moe_offload._version import VERSION
from moe_offload.cli.lazy_group import is_debug
from moe_offload.cli.progress import TerminalProgress
from moe_offload.cli.ranks import group_if_any
from moe_offload.cli.report import format_seconds
from moe_offload.cli.sampling import Sampling
from moe_offload.errors import ConfigError

if TYPE_CHECKING:
    from moe_offload.offload.model import OffloadedModel
    from moe_offload.offload.planning.plan import Plan

_SOURCE = "source"
_LOSSLESS_PATH = "copy"


@dataclass(frozen=True)
class OpenedModel:
    """A loaded model and what it took."""

    model: "OffloadedModel"
    name: str
    load_s: float


@contextmanager
def open_model(name: str | None, load: Mapping[str, Any], console: Console) -> Iterator[OpenedModel]:
    """The model called ``name`` (None: the demo), open inside the ``with``; ``console`` is told what happens."""
    progress = TerminalProgress(console)
    started_s = time.monotonic()

    def show_plan(plan: "Plan") -> None:
        nonlocal started_s
        started_s = time.monotonic()
        console.print(Text(plan.render()), style="dim")

    with quiet_libraries(console):
        with console.status("Starting", spinner="dots"):
            from moe_offload.offload.model import OffloadedModel

            silence_transformers()
        with group_if_any(load.get("device", "auto")) as group:
            try:
                if name is None:
                    from moe_offload.offload.demo.build import demo_budget, ensure_demo

                    path = str(ensure_demo(progress) if group is None else group.in_turn(ensure_demo, "demo"))
                    name, load = "the built-in demo", demo_budget(load.get("device", "auto")) | dict(load)
                else:
                    path = name
                _refuse_other_formats(path, load)
                shared: dict[str, Any] = {} if group is None else {"group": group}
                model = OffloadedModel.from_pretrained(path, on_progress=progress, on_plan=show_plan, **load, **shared)
            finally:
                progress.abandon()
            with model:
                yield OpenedModel(model, name, time.monotonic() - started_s)
        if (trace := load.get("trace")) is not None and Path(trace).exists():
            console.print(Text(f"trace written to {trace}"), style="dim")


def _refuse_other_formats(path: str, load: Mapping[str, Any]) -> None:
    """A pack is in the formats that it was made in: to ask for others would change nothing."""
    from moe_offload.offload.pack.manifest import is_pack

    given = [option for option in ("format", "dense_format", "revision") if option in load]
    if given and is_pack(path):
        options = " and ".join(f"--{option.replace('_', '-')}" for option in given)
        raise ConfigError(
            f"{path} is a pack already, which {options} cannot change; leave out {options}, or name the checkpoint"
        )


def banner(opened: OpenedModel, sampling: Sampling) -> Text:
    """Model, format, exactness, what is where, kernels and loading time, at a glance."""
    from moe_offload.quant import backend_name

    manifest = opened.model.manifest
    rows = [
        ("model", opened.name),
        ("format", f"experts {manifest.expert_format}, the rest {manifest.dense_format}"),
        ("answers", exactness(manifest, opened.model.miss_path)),
        ("experts", residence(opened.model.plan)),
        *([] if opened.model.group is None else [("ranks", opened.model.group.note)]),
        ("kernels", backend_name()),
        ("sampling", str(sampling)),
        ("loaded", f"in {format_seconds(opened.load_s)}"),
    ]
    text = Text(f"moe-offload {VERSION}", style="bold")
    for label, value in rows:
        text.append(f"\n  {label:<10}", style="not bold cyan").append(value, style="not bold default")
    return text


def exactness(manifest: Any, miss_path: str) -> str:
    """What the answers equal."""
    lossy = [spec for spec in (manifest.expert_format, manifest.dense_format) if spec != _SOURCE]
    if miss_path != _LOSSLESS_PATH:
        at = f"at {lossy[0]}" if lossy else "with the checkpoint's own numbers"
        return f"exact to rounding {at}: the CPU computes some experts (--miss-path {miss_path})"
    if not lossy:
        return "exact: the checkpoint's own numbers"
    return f"exact at {lossy[0]}: identical to the fully resident model in this format"


def residence(plan: "Plan") -> str:
    """What part of the experts is where."""
    fast, second = ("RAM", None) if plan.device == "cpu" else ("VRAM", "RAM")
    if plan.parts:
        fast = f"VRAM of {len(plan.parts)} GPUs"
    if plan.resident_share >= 1:
        return f"all kept in {fast}"
    parts = [f"{plan.resident_share:.0%} kept in {fast}"]
    if second and plan.host_share > 0:
        parts.append(f"{min(plan.host_share, 1):.0%} in {second}")
    return ", ".join([*parts, "the rest streamed from disk"])


@contextmanager
def quiet_libraries(console: Console) -> Iterator[None]:
    """Show warnings meant for users as a line each, and the libraries' other messages only when debugging."""
    if is_debug():
        yield
        return

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if not issubclass(category, DeprecationWarning | PendingDeprecationWarning | FutureWarning):
            console.print(Text(f"Warning: {message}", style="yellow"))

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def silence_transformers() -> None:
    """Keep its messages to those who debug; called when it was imported."""
    if "transformers" in sys.modules and not is_debug():
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
