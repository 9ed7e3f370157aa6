"""A model being recorded: the hooks, the thread that turns notes into a trace, and the end of it."""

import datetime
import gc
import math
import platform
import threading
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from torch import nn
from torch.utils.hooks import RemovableHandle

from moe_offload._version import VERSION
from moe_offload.cache import RoutingTrace, read_trace
from moe_offload.cache.trace import Array
from moe_offload.cache.trace_blocks import join_blocks
from moe_offload.cache.trace_writer import TraceWriter
from moe_offload.errors import ConfigError
from moe_offload.offload.bench.traffic import used_dense_bytes
from moe_offload.offload.experts.lookahead import find_router
from moe_offload.offload.loader import LoadedModel
from moe_offload.offload.pack.manifest import PackManifest
from moe_offload.offload.pass_inputs import pass_tokens
from moe_offload.offload.planning.plan import Plan
from moe_offload.offload.tracing.blocks import BlockMaker
from moe_offload.offload.tracing.recorder import Recorder

FLUSH_EVERY_S = 1.0


class BlockSink(Protocol):
    """Takes the blocks of a trace; one thread at a time."""

    failure: str | None

    def write(self, arrays: Mapping[str, Array], meta: Mapping[str, Any] | None = None) -> None: ...
    def close(self) -> None: ...


class MemorySink:
    """Keeps the blocks."""

    def __init__(self) -> None:
        self.blocks: list[Mapping[str, Array]] = []
        self.meta: Mapping[str, Any] = {}
        self.failure: str | None = None

    def write(self, arrays: Mapping[str, Array], meta: Mapping[str, Any] | None = None) -> None:
        self.blocks.append(arrays)
        self.meta = self.meta if meta is None else meta

    def close(self) -> None:
        """Nothing to do."""


class Recording:
    """Records a model from the beginning to `end`. Use as a context manager, or `end` it."""

    def __init__(
        self,
        loaded: LoadedModel,
        plan: Plan,
        manifest: PackManifest,
        *,
        settings: dict[str, Any],
        writer: TraceWriter | None = None,
        tokens: bool = False,
    ) -> None:
        """Begins at once. Without a ``writer`` the trace is kept in memory; ``settings`` are told in its meta."""
        if loaded.residency.observer is not None:
            raise ConfigError("the model is being recorded already; end that recording first")
        self._loaded, self._path = loaded, None if writer is None else writer.path
        self._sink: BlockSink = MemorySink() if writer is None else writer
        self._recorder = Recorder(lambda: loaded.step.prefill, tokens=tokens)
        self._blocks = BlockMaker(plan.num_experts, self._recorder.begin_ns)
        self._meta = trace_meta(plan, manifest) | {"dense_bytes_per_token": used_dense_bytes(loaded.model)} | settings
        self._told = -1
        self._failure: str | None = None
        self._ended = False
        self._lock = threading.Lock()
        self._sink.write(
            {
                "num_experts": np.array(plan.num_experts, np.int32),
                "num_slots": np.array(plan.num_slots, np.int32),
                "expert_bytes": np.array(plan.slot_bytes, np.int64),
            },
            self._meta,
        )
        self._hooks = self._hook([layer.module for layer in manifest.layers])
        residency = loaded.residency
        residency.observe_reads(self._recorder.transfers)
        residency.observe_copies(self._recorder.copies)
        residency.observer = self._recorder
        residency.cache.observe(self._recorder)
        # Notes are kept for a second, so the garbage collector comes by often, and each full round would go through all
        # that torch and transformers consist of: what is there now is left out of it for the time being.
        self._froze = gc.get_freeze_count() == 0
        if self._froze:
            gc.freeze()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moe-offload-trace", daemon=True)
        self._thread.start()

    def _hook(self, containers: list[str]) -> list[RemovableHandle]:
        model, recorder = self._loaded.model, self._recorder

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            recorder.begin_pass(module, pass_tokens(args, kwargs))

        def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            recorder.end_pass(module)

        def router_called(module: nn.Module, args: tuple[Any, ...]) -> None:
            recorder.router_called()

        modules = [model, model.get_encoder()] if model.config.is_encoder_decoder else [model]
        routers = {find_router(model, name) for name in containers} - {None}
        return [
            *(module.register_forward_pre_hook(begin, with_kwargs=True) for module in modules),
            *(module.register_forward_hook(end) for module in modules),
            *(router.register_forward_pre_hook(router_called) for router in routers if router is not None),
        ]

    def _run(self) -> None:
        while not self._stop.wait(FLUSH_EVERY_S):
            self._flush(last=False)

    def _flush(self, *, last: bool) -> None:
        """Write what is complete; whatever goes wrong ends the trace and not the run."""
        with self._lock:
            if self._failure is not None:
                return
            try:
                passes, events = self._recorder.take(last=last)
                transfers = self._recorder.transfers.take(all_of_them=last)
                arrays = self._blocks.block(passes, events, transfers) | self._copies()
                answers = list(self._recorder.answers)
                is_news = len(answers) != self._told
                if arrays or is_news:
                    self._sink.write(arrays, self._meta | _answers(answers) if is_news else None)
                    self._told = len(answers)
            except Exception as error:
                self._failure = f"{type(error).__name__}: {error}"

    def _copies(self) -> dict[str, Array]:
        """Those that are over, and the fastest of each link so far."""
        peaks = self._loaded.residency.link_peaks_bytes_per_s  # asked first: that is when times are read
        arrays = self._blocks.copies(self._recorder.copies.take())
        return arrays | {"link_bytes_per_s": np.array(peaks, np.float32)} if arrays else {}

    def end(self) -> None:
        """Write what is left and take the hooks out; warns if the trace ended early. May be called twice."""
        if self._ended:
            return
        self._ended = True
        residency = self._loaded.residency
        residency.observer = None
        residency.cache.observe(None)
        residency.observe_reads(None)
        residency.observe_copies(None)
        for hook in self._hooks:
            hook.remove()
        if self._froze:
            gc.unfreeze()
        self._stop.set()
        self._thread.join()
        self._flush(last=True)
        self._sink.close()
        failure = self._failure or self._sink.failure
        if failure is not None:
            warnings.warn(f"the trace ended early: {failure}", stacklevel=2)

    @cached_property
    def trace(self) -> RoutingTrace:
        """What was recorded; ConfigError before the `end`."""
        if not self._ended:
            raise ConfigError("the recording has not ended yet; leave its `with`, or call end()")
        if self._path is not None:
            return read_trace(self._path)
        assert isinstance(self._sink, MemorySink)
        return join_blocks(self._sink.blocks, self._sink.meta)

    def __enter__(self) -> "Recording":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def trace_meta(plan: Plan, manifest: PackManifest) -> dict[str, Any]:
    """What a trace tells of the model and the machine, and nothing of who ran it, where or on what text."""
    return {
        "model": Path(manifest.source).name if Path(manifest.source).is_absolute() else manifest.source,
        "revision": manifest.revision,
        "format": manifest.expert_format,
        "dense_format": manifest.dense_format,
        "expert_bits": _expert_bits(manifest),
        "device": plan.device,
        "ram_bytes": plan.ram_bytes,
        "vram_bytes": plan.vram_bytes,
        "context_tokens": plan.context_tokens,
        "num_host_slots": list(plan.num_host_slots),
        "staging_slots": plan.staging_slots,
        "threads": torch.get_num_threads(),
        "recorded_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "moe-offload": VERSION,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _expert_bits(manifest: PackManifest) -> float:
    """Bits a weight, scales included, of all experts together."""
    parts = [(layer.num_experts, part) for layer in manifest.layers for part in layer.parts]
    num_weights = sum(num_experts * math.prod(part.shape) for num_experts, part in parts)
    return 8 * sum(num_experts * part.size_bytes for num_experts, part in parts) / num_weights


def _answers(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """By sequence: the time to its first token, and the tokens."""
    first_s: list[float | None] = [None] * (1 + max((answer["sequence"] for answer in answers), default=-1))
    for answer in answers:
        first_s[answer["sequence"]] = answer["time_to_first_token_s"]
    return {"answers": answers, "time_to_first_token_s": first_s}
