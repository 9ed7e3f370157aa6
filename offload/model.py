"""`OffloadedModel`: what a Python user holds."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from jinja2 import TemplateError
from transformers import AutoTokenizer

from moe_offload.cache import DEFAULT_POLICY, LEARNED, ExpertCache, policy_names
from moe_offload.cache.learned import make_learned_policy
from moe_offload.cache.trace_writer import TraceWriter, kept_if_used
from moe_offload.errors import ConfigError, SourceError
from moe_offload.offload.context_room import ContextRoom
from moe_offload.offload.dense_weights import DenseWeights
from moe_offload.offload.devices import pick_device
from moe_offload.offload.experts.lookahead import Lookahead
from moe_offload.offload.experts.miss_path import COPY, check_miss_path
from moe_offload.offload.experts.prefetch_tuning import PrefetchSwitch, parse_prefetch
from moe_offload.offload.experts.step_tuning import StepClock, Turn
from moe_offload.offload.experts.warm_start import HotSetFile, WarmStart
from moe_offload.offload.first_use import find_pack, pack_config
from moe_offload.offload.freed_memory import give_freed_memory_back, keep_few_kernels, keep_freed_memory_in_prompts
from moe_offload.offload.generation import Generator
from moe_offload.offload.graphs.choice import check_graphs, decode_graphs
from moe_offload.offload.learning.predictor_file import load_predictor
from moe_offload.offload.loader import LoadedModel, load_model
from moe_offload.offload.meter import Meter
from moe_offload.offload.pack.manifest import PackManifest, read_manifest
from moe_offload.offload.pack.outline import PackOutline
from moe_offload.offload.pack.shared_out import check_share, shape_of_share
from moe_offload.offload.planning.caching_allocator import small_bytes
from moe_offload.offload.planning.memory import (
    ram_budget_bytes,
    ram_memory,
    vram_budget_bytes,
    vram_budgets_bytes,
    vram_memory,
)
from moe_offload.offload.planning.placement import Placement
from moe_offload.offload.planning.plan import PackShape, Plan, make_plan
from moe_offload.offload.planning.vram_option import VramSize, vram_by_device
from moe_offload.offload.planning.workspace import experts_per_token
from moe_offload.offload.progress import ProgressSink
from moe_offload.offload.reports import RunReport
from moe_offload.offload.row_embedding import table_in_pack
from moe_offload.offload.tiers.choice import make_tier
from moe_offload.offload.tiers.compute_tier import ComputeTier

if TYPE_CHECKING:  # what most runs do without, and imports a good deal
    from moe_offload.offload.parallel.group import ExpertGroup
    from moe_offload.offload.parallel.remote_experts import RemoteExperts
    from moe_offload.offload.profiling.prompts import OnPrompt, Prompt
    from moe_offload.offload.profiling.report import ProfileReport
    from moe_offload.offload.profiling.run_facts import Rates
    from moe_offload.offload.tracing.recording import Recording

CLOSE_TIMEOUT_S = 10.0
VERIFY_MODES = ("first", "always", "off")


def _first_device(name: str, vram_sizes: Mapping[int, str | int]) -> torch.device:
    """The first of the GPUs that amounts of memory are given for."""
    if name not in ("auto", "cuda"):
        raise ConfigError(f"--vram says which GPUs to use; leave out --device {name}, or give --vram a single amount")
    return pick_device(f"cuda:{min(vram_sizes)}")


def _dtype(name: str | torch.dtype, config: Any) -> torch.dtype:
    """The dtype of the dense weights and of the activations; ``auto`` is the checkpoint's."""
    if name == "auto":
        name = config.dtype or torch.bfloat16
    found = getattr(torch, name, None) if isinstance(name, str) else name
    if found not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"dtype {name!r} is not supported; use auto, float32, bfloat16 or float16")
    return found


class OffloadedModel:
    """A mixture-of-experts model under a memory budget.

    ``model`` is a transformers model and can be used as one; ``tokenizer`` is its tokenizer, or None if the checkpoint
    has none. Use as a context manager, or `close` it.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        tokenizer: Any,
        plan: Plan,
        manifest: PackManifest,
        *,
        policy: str,
        prefetch: str | int,
        miss_path: str,
        top_k: int,
        tier: ComputeTier,
        graphs: str = "auto",
        hot_set: HotSetFile | None = None,
        trace: TraceWriter | None = None,
        trace_tokens: bool = False,
        group: "ExpertGroup | None" = None,
        peers: "RemoteExperts | None" = None,
    ) -> None:
        """For `from_pretrained`."""
        self.group = group
        self._peers = loaded.residency.peers = peers
        self.model, self.tokenizer = loaded.model, tokenizer
        self.plan, self.manifest = plan, manifest
        self._residency, self._step = loaded.residency, loaded.step
        modules = [layer.module for layer in manifest.layers]
        lookahead = Lookahead(self.model, modules, [top_k] * len(modules), loaded.residency)
        loaded.step.predictor = lookahead
        clock, turn = StepClock(self.model, lambda: loaded.step.prefill, loaded.residency.num_missed), Turn()
        loaded.residency.take_miss_path(miss_path, clock, turn)
        PrefetchSwitch(self.model, loaded.step, lookahead, prefetch, clock, turn)
        self._graphs = decode_graphs(
            self.model,
            loaded.step,
            loaded.residency,
            tier,
            graphs,
            context_tokens=plan.context_tokens,
            top_k=top_k,
            lookahead=lookahead,
            most_ahead=parse_prefetch(prefetch),
            clock=clock,
        )
        ContextRoom(self.model, plan, loaded.residency, moved=self._graphs.forget)
        lookahead.begin_prompts_early(self.model, lambda: loaded.step.prefill)  # when layers have the slots they keep
        if plan.device == "cpu":
            keep_freed_memory_in_prompts(self.model)
        self._meter = Meter(loaded.residency, lookahead)
        self._loaded_at = self._meter.read()
        self._hot_set = hot_set
        self._loaded = loaded
        self.miss_path = COPY if loaded.residency.miss_path is None else miss_path
        self._settings = {"policy": policy, "prefetch": str(prefetch), "miss_path": self.miss_path}
        self._recording = None if trace is None else self._record(trace, tokens=trace_tokens)
        if hot_set is not None:
            WarmStart(loaded.residency, hot_set.load())
        self._generator = Generator(
            self.model,
            tokenizer,
            self._meter,
            loaded.step,
            context_tokens=plan.context_tokens,
            chunk_tokens=plan.prefill_chunk_tokens,
            graphs=self._graphs,
        )

    @classmethod
    def from_pretrained(
        cls,
        model: str | PathLike[str],
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
        miss_path: str = "copy",
        graphs: str = "auto",
        warm_start: bool = True,
        verify: str = "first",
        revision: str | None = None,
        token: str | None = None,
        pack_dir: str | PathLike[str] | None = None,
        trace: str | PathLike[str] | None = None,
        trace_tokens: bool = False,
        group: "ExpertGroup | None" = None,
        on_progress: ProgressSink | None = None,
        on_plan: Callable[[Plan], None] | None = None,
    ) -> Self:
        """Load ``model``: a pack, a checkpoint folder or a hub id (both packed first, once, into ``pack_dir``).

        ``vram`` and ``ram`` bound what is allocated there: bytes, "6GiB", "80%" or "auto" (what is free, less a
        margin); ``vram={0: "10GiB", 1: "10GiB"}`` divides the layers among GPUs. ``format`` (also ``mixed:3.5``) and
        ``dense_format`` say how a checkpoint is packed; a pack has its own. ``prefetch`` is "off", "auto" or the number
        of layers to look ahead; it never changes the result, and neither do budgets and policies, nor ``graphs``: "on"
        runs decode steps on a GPU from CUDA graphs or fails, and "auto" does where it can. ``miss_path`` says where a
        GPU's misses are computed: "copy" (there, lossless), "cpu" (by the CPU, from RAM), "split" (some here, some
        there) or "auto" (the fastest of these, by trials in the run); all but the first are exact to rounding.
        ``warm_start``: keep in a small file beside the pack which experts were hot when the model was closed, and read
        those first, in the background. ``verify``: check an expert's checksum on its "first" read, "always" or "off".
        ``trace``: a file (``.npz``) to record routing, cache and times to until the model is closed, with the ids of
        tokens only where ``trace_tokens``; see `tracing`. ``group``: other processes that hold a part of the experts
        each, and call `serve_experts` meanwhile (docs/scaling.md); budgets are of each process, and this one is rank 0.

        Raises `BudgetError` with the smallest budget that works, before anything is read; `ConfigError`,
        `SourceError`, `UnsupportedModelError`, `PackError`.
        """
        if policy not in (*policy_names(), LEARNED):
            raise ConfigError(f"no policy {policy!r}; there are: {', '.join((*policy_names(), LEARNED))}")
        if verify not in VERIFY_MODES:
            raise ConfigError(f"verify is {verify!r}; use {', '.join(VERIFY_MODES)}")
        if context_tokens < 1:
            raise ConfigError(f"context_tokens is {context_tokens}; it must be 1 or more")
        if trace_tokens and trace is None:
            raise ConfigError("the ids of tokens can only be recorded with a trace: name its file (--trace FILE)")
        if group is not None and trace is not None:
            raise ConfigError("a trace is of one process that has all experts; start it without torchrun")
        depth = parse_prefetch(prefetch)
        vram_sizes = vram_by_device(vram)
        if group is not None and vram_sizes is not None:
            raise ConfigError("every rank computes on one GPU: give --vram a single amount, or leave out torchrun")
        local_rank = None if group is None else group.place.local_rank
        torch_device = pick_device(device, local_rank) if vram_sizes is None else _first_device(device, vram_sizes)
        check_graphs(graphs, torch_device.type)
        share = None if group is None else group.share
        free_ram = ram_memory() if group is None else group.ram

        def plan_for(pack: PackShape, config: Any, dense_bytes: Mapping[str, int], torch_dtype: torch.dtype) -> Plan:
            budgets_bytes = None if vram_sizes is None else vram_budgets_bytes(vram_sizes)

            def place(cache_bytes: Sequence[int], overhead_bytes: int) -> Placement:
                from moe_offload.offload.planning.place_model import place_model

                return place_model(
                    config,
                    pack.layers,
                    dense_bytes,
                    cache_bytes,
                    budgets_bytes=budgets_bytes or {},
                    overhead_bytes=overhead_bytes,
                )

            plan = make_plan(
                shape_of_share(pack, share),
                config,
                device=torch_device.type,  # type: ignore[arg-type]
                ram_bytes=ram_budget_bytes(ram, free_ram),
                vram_bytes=sum(budgets_bytes.values()) if budgets_bytes else _vram_bytes(vram, torch_device),
                context_tokens=context_tokens,
                dtype_bytes=torch_dtype.itemsize,
                top_k_per_layer=[experts_per_token(config.get_text_config(decoder=True))] * len(pack.layers),
                prefetch_depth=depth,
                resident_dense_bytes=sum(dense_bytes.values()),
                small_dense_bytes=small_bytes(dense_bytes.values()),
                graphs=graphs != "off" and group is None,
                place=place if budgets_bytes and len(budgets_bytes) > 1 else None,
            )
            check_miss_path(miss_path, plan.device)
            return plan

        def check_budget(outline: PackOutline) -> None:
            torch_dtype = _dtype(dtype, outline.config)
            table = table_in_pack(outline.config, outline.dense_names, torch_device.type)
            plan_for(
                outline, outline.config, _without(table, outline.resident_sizes(torch_dtype.itemsize)), torch_dtype
            )

        with kept_if_used(trace) as writer:
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
            check_share(manifest, share, folder)
            config = pack_config(folder)
            torch_dtype = _dtype(dtype, config)
            tokenizer = _tokenizer(folder)
            with DenseWeights(folder, manifest) as dense:
                top_k = experts_per_token(config.get_text_config(decoder=True))
                table = table_in_pack(config, dense.keys(), torch_device.type)
                plan = plan_for(manifest, config, _without(table, dense.resident_sizes(torch_dtype)), torch_dtype)
                if on_plan is not None:
                    on_plan(plan)
                if group is not None:
                    group.agree(manifest)
                if verify != "off":
                    dense.check()
                made = make_learned_policy(load_predictor(folder, manifest)) if policy == LEARNED else policy
                num_experts = [layer.num_experts for layer in manifest.layers]
                cache = ExpertCache(num_experts, plan.num_slots, made)
                tier = make_tier(manifest, folder, plan, torch_device, verify)  # type: ignore[arg-type]
                try:
                    loaded = load_model(
                        str(folder),
                        config,
                        manifest,
                        dense,
                        cache=cache,
                        tier=tier,
                        dtype=torch_dtype,
                        device_map=plan.device_map or {"": torch_device},
                    )
                except BaseException:
                    tier.close()
                    raise
            hot_set = HotSetFile(folder, num_experts, share) if warm_start else None
            peers = None if group is None else group.open_peers(torch_device)
            return cls(
                loaded,
                tokenizer,
                plan,
                manifest,
                policy=policy,
                prefetch=prefetch,
                miss_path=miss_path,
                top_k=top_k,
                tier=tier,
                graphs=graphs,
                hot_set=hot_set,
                trace=writer,
                trace_tokens=trace_tokens,
                group=group,
                peers=peers,
            )

    # -- text --

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 256,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> str:
        """Continue ``prompt``; greedy without a temperature. Stops at the model's end token or a full context."""
        return self._generator.text(
            self._encode(prompt),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
        )

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 256,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> Iterator[str]:
        """As `generate`, in pieces as they are made; leaving the iterator stops the generation."""
        return self._generator.stream(
            self._encode(prompt),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
        )

    def chat(self, messages: list[dict[str, str]], **sampling: Any) -> str:
        """The answer to a conversation of ``{"role": ..., "content": ...}``, by the tokenizer's chat template.

        ``sampling`` as in `generate`.
        """
        return self._generator.text(self._encode_chat(messages), **({"max_new_tokens": 256} | _sampling(sampling)))

    def stream_chat(self, messages: list[dict[str, str]], **sampling: Any) -> Iterator[str]:
        """As `chat`, in pieces as they are made; marks that tell reasoning from the answer (``<think>``) stay in."""
        return self._generator.stream(
            self._encode_chat(messages),
            keep_reasoning_markers=True,
            **({"max_new_tokens": 256} | _sampling(sampling)),
        )

    def stop(self) -> None:
        """End every running generation, after the token it is at or in the middle of its prompt; from any thread."""
        self._generator.stop()

    def _encode(self, prompt: str) -> Any:
        if self.tokenizer is None:
            raise ConfigError("the model came without a tokenizer; call .model.generate with token ids")
        inputs = self.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        if inputs["input_ids"].shape[1] == 0:
            raise ConfigError("the prompt is empty")
        return inputs

    def _encode_chat(self, messages: list[dict[str, str]]) -> Any:
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise ConfigError("the model has no chat template: it is not made for chat; use generate (--raw)")
        if not messages:
            raise ConfigError("the conversation has no messages")
        try:
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except TemplateError as error:
            raise ConfigError(f"the model's chat template refuses this conversation: {error}") from error

    # -- figures --

    @property
    def last_run(self) -> RunReport | None:
        """The figures of the last answer."""
        return self._generator.last_run

    @property
    def stats(self) -> RunReport:
        """The figures of everything since the model was loaded (tokens and times of this object's answers only)."""
        generator = self._generator
        return self._meter.since(
            self._loaded_at,
            prompt_tokens=generator.prompt_tokens,
            new_tokens=generator.new_tokens,
            time_to_first_token_s=generator.time_to_first_token_s,
            decode_s=generator.decode_s,
        )

    def tracing(self, path: str | PathLike[str] | None = None, *, tokens: bool = False) -> "Recording":
        """Record what the model does inside a ``with``, into a file or, without a ``path``, in memory::

            with model.tracing() as recording:
                model.generate("Once upon a time")
            recording.trace  # a RoutingTrace: see docs/trace-format.md

        ``tokens``: the ids of tokens too. `ConfigError` where the file cannot be written, or while another recording
        is under way.
        """
        with kept_if_used(path) as writer:
            return self._record(writer, tokens=tokens)

    def _record(self, writer: TraceWriter | None, *, tokens: bool) -> "Recording":
        from moe_offload.offload.tracing.recording import Recording

        return Recording(self._loaded, self.plan, self.manifest, settings=self._settings, writer=writer, tokens=tokens)

    def profile(
        self,
        prompts: "Sequence[str | Prompt] | None" = None,
        *,
        max_new_tokens: int = 64,
        rates: "Rates | None" = None,
        measure_rates: bool = True,
        trace: str | PathLike[str] | None = None,
        perfetto: str | PathLike[str] | None = None,
        on_prompt: "OnPrompt | None" = None,
    ) -> "ProfileReport":
        """Run prompts and tell where the bytes and the time went::

            report = model.profile()
            print(report)
            report.save_html("profile.html")

        ``prompts``: texts, as messages where the model chats; without any, a built-in mix of English, code, maths,
        German and chat. ``rates``: what the bound is of; where it lacks one, that is measured after the run, which
        takes a few seconds and up to 400 MiB beside the budget, unless ``measure_rates`` is False. ``trace`` and
        ``perfetto``: files to keep the trace in, and its times for ui.perfetto.dev. `ConfigError` as `tracing` and
        `generate`.
        """
        from moe_offload.offload.profiling.live import profile

        return profile(
            self,
            prompts,
            max_new_tokens=max_new_tokens,
            rates=rates,
            measure_rates=measure_rates,
            trace=trace,
            perfetto=perfetto,
            on_prompt=on_prompt,
        )

    def load_figures(self, *, context_tokens: int) -> dict[str, Any]:
        """What a decode step with so many tokens in its past moves, in numbers that a forecast can be checked by."""
        from moe_offload.offload.forecast.loaded_model import load_figures

        return load_figures(self, context_tokens=context_tokens)

    # -- life --

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused, with the reason."""
        self.model.save_pretrained(*args, **kwargs)

    def close(self) -> None:
        """Stop what is running and free the slots; the model refuses to run afterwards. May be called twice."""
        self.stop()
        self._generator.wait_until_idle(CLOSE_TIMEOUT_S)
        if self._hot_set is not None and not self._step.closed:
            self._hot_set.save(self._residency.cache.hot_set())
        self._step.closed = True
        self._graphs.close()
        self._residency.close()
        if self._peers is not None:
            self._peers.close()
        if self._recording is not None:
            self._recording.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _sampling(arguments: dict[str, Any]) -> dict[str, Any]:
    known = {"max_new_tokens", "temperature", "top_p", "top_k", "seed"}
    if unknown := sorted(set(arguments) - known):
        raise ConfigError(f"unknown arguments {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return {"temperature": None, "top_p": None, "top_k": None} | arguments


def _vram_bytes(vram: VramSize, device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    memory = vram_memory(device.index)
    assert memory is not None, "a CUDA device was found before"
    assert isinstance(vram, str | int), "amounts by device are for several"
    return vram_budget_bytes(vram, memory)


def _without(name: str | None, sizes: Mapping[str, int]) -> dict[str, int]:
    return {each: size_bytes for each, size_bytes in sizes.items() if each != name}


def _tokenizer(folder: Path) -> Any:
    """The tokenizer of the pack, or None where the checkpoint had none."""
    if not any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exceptions for a damaged file, others for a missing package
        raise SourceError(
            f"the tokenizer in {folder} cannot be loaded: {error}; install what it names, or mend its files there"
        ) from error
