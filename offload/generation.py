"""One answer: transformers' ``generate`` with a clock, a stop switch and a report around it."""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import (
    BatchEncoding,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
)

from moe_offload.errors import ConfigError
from moe_offload.offload.answer_clock import AnswerClock
from moe_offload.offload.decode.step_threads import between_steps_too
from moe_offload.offload.experts.layer import StepState, StoppedError
from moe_offload.offload.graphs.choice import DecodeGraphs
from moe_offload.offload.meter import Meter, Reading
from moe_offload.offload.reports import RunReport
from moe_offload.offload.sampling import sampling_config
from moe_offload.offload.text_stream import TextStream

NO_GRAPHS = DecodeGraphs()


class _Replay(LogitsProcessor):  # type: ignore[misc]
    """Makes the next token the one that is given, whatever the model would say."""

    def __init__(self, token_ids: list[int]) -> None:
        self._token_ids = iter(token_ids)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, next(self._token_ids)] = torch.inf
        return scores


class Generator:
    """Runs answers on a model one after the other, or several at once from several threads."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        meter: Meter,
        step: StepState,
        *,
        context_tokens: int,
        chunk_tokens: int,
        graphs: DecodeGraphs = NO_GRAPHS,
    ) -> None:
        self._model, self._tokenizer, self._meter, self._step = model, tokenizer, meter, step
        self._context_tokens, self._chunk_tokens = context_tokens, chunk_tokens
        self._graphs = graphs
        # Weak: an interrupt may strike between the beginning of an answer and the code that sees to its end.
        self._running: weakref.WeakSet[AnswerClock] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self.last_run: RunReport | None = None
        self.prompt_tokens = self.new_tokens = 0
        self.time_to_first_token_s = self.decode_s = 0.0

    def stop(self) -> None:
        """Every running answer ends after the token it is at, or at the next layer if it is still at its prompt."""
        with self._lock:
            for clock in self._running:
                clock.stopped.set()

    def wait_until_idle(self, timeout_s: float) -> None:
        """Return when no answer is running any more, or when the time is over."""
        with self._lock:
            self._idle.wait_for(lambda: not self._running, timeout_s)

    def text(self, inputs: Any, *, seed: int | None = None, **sampling: Any) -> str:
        """The whole answer."""
        new_tokens = self._run(inputs, seed, sampling, None, self._begin(AnswerClock()))
        text: str = self._tokenizer.decode(new_tokens, skip_special_tokens=True)
        return text

    def stream(
        self, inputs: Any, *, keep_reasoning_markers: bool = False, seed: int | None = None, **sampling: Any
    ) -> Iterator[str]:
        """The answer in pieces of text. Leaving the iterator early stops it."""
        streamer = TextStream(
            self._tokenizer,
            skip_prompt=not self._model.config.is_encoder_decoder,
            keep_reasoning_markers=keep_reasoning_markers,
        )
        clock = self._begin(AnswerClock())

        def generate() -> None:
            try:
                self._run(inputs, seed, sampling, streamer, clock)
            except BaseException as error:
                streamer.fail(error)

        thread = threading.Thread(target=generate, name="moe-offload-generate", daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            clock.stopped.set()
            thread.join()

    def replay(self, prompt_ids: torch.Tensor, token_ids: list[int], watch: Callable[[int], None]) -> RunReport:
        """Read a prompt ``[1, T]`` and write the tokens that are given, as an answer would be made: for benchmarks.

        ``watch`` is called after every token with their number.
        """
        clock = self._begin(AnswerClock(watch))
        inputs = BatchEncoding({"input_ids": prompt_ids, "attention_mask": torch.ones_like(prompt_ids)})
        greedy = {"max_new_tokens": len(token_ids), "temperature": None, "top_p": None, "top_k": None}
        self._run(inputs, None, greedy, None, clock, [_Replay(token_ids)])
        assert self.last_run is not None
        return self.last_run

    def _begin(self, clock: AnswerClock) -> AnswerClock:
        """The clock of an answer, which `stop` reaches from now on."""
        residency = self._meter.residency
        if residency.link_peaks_bytes_per_s:
            clock.copied = lambda: residency.link_totals.num_bytes
        with self._lock:
            self._running.add(clock)
        return clock

    def _run(
        self,
        inputs: Any,
        seed: int | None,
        sampling: dict[str, Any],
        streamer: Any,
        clock: AnswerClock,
        processors: Sequence[LogitsProcessor] = (),
    ) -> torch.Tensor:
        """The ids of the new tokens ``[n]``."""
        prompt_tokens = int(inputs["input_ids"].shape[1])
        earlier = self._meter.read()
        try:
            config = self._config(prompt_tokens, sampling)
            self._meter.residency.new_sequence()
            if seed is not None:
                torch.manual_seed(seed)
            with (
                torch.inference_mode(),
                between_steps_too(self._model),
                self._step.stoppable(clock.stopped),
                self._cache(config, inputs) as cache,
            ):
                output: torch.Tensor = self._model.generate(
                    **inputs.to(self._model.device),
                    **cache,
                    generation_config=config,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([clock]),
                    logits_processor=LogitsProcessorList(processors),
                )
        except StoppedError:  # in the prompt; or later, where a model without a cache is at all of its text again
            if streamer is not None:
                streamer.end()
            output = clock.ids
        finally:
            self._graphs.tell_uses()
            self._report(clock, prompt_tokens, earlier)
        return output[0] if self._model.config.is_encoder_decoder else output[0, prompt_tokens:]

    def _config(self, prompt_tokens: int, sampling: dict[str, Any]) -> GenerationConfig:
        room_tokens = self._context_tokens - prompt_tokens
        if room_tokens < 1:
            raise ConfigError(
                f"the prompt has {prompt_tokens} tokens, the context holds {self._context_tokens}; "
                f"load the model with a longer --context (context_tokens)"
            )
        sampling["max_new_tokens"] = min(sampling["max_new_tokens"], room_tokens)
        config = sampling_config(self._model.generation_config, **sampling)
        if self._may_chunk(prompt_tokens):
            config.prefill_chunk_size = self._chunk_tokens
        return config

    @contextmanager
    def _cache(self, config: GenerationConfig, inputs: Any) -> Iterator[dict[str, Any]]:
        """What `generate` is to be told of a cache: nothing where it makes its own."""
        caches = self._graphs.caches
        if caches is None or inputs["input_ids"].shape[0] != 1:
            yield {}
            return
        config.disable_compile = True  # a static cache would have generate compile the model
        with caches.lend(inputs["input_ids"].shape[1] + config.max_new_tokens) as cache:
            yield {"past_key_values": cache}

    def _may_chunk(self, prompt_tokens: int) -> bool:
        """A long prompt goes through in pieces, unless the model carries a state that its pieces would not pass on."""
        model = self._model
        return (
            prompt_tokens > self._chunk_tokens
            and not model.config.is_encoder_decoder
            and not getattr(model, "_is_stateful", False)
        )

    def _report(self, clock: AnswerClock, prompt_tokens: int, earlier: Reading) -> None:
        with self._lock:
            self._running.discard(clock)
            self._idle.notify_all()
            report = self._meter.since(
                earlier,
                prompt_tokens=prompt_tokens,
                new_tokens=clock.num_tokens,
                time_to_first_token_s=clock.first_s - clock.begin_s,
                decode_s=clock.last_s - clock.first_s,
            )
            report = replace(report, link_use_steps=clock.link_use(report.link_peak_bytes_per_s))
            self.last_run = report
            self.prompt_tokens += report.prompt_tokens
            self.new_tokens += report.new_tokens
            self.time_to_first_token_s += report.time_to_first_token_s
            self.decode_s += report.decode_s
        if (observer := self._meter.residency.observer) is not None:
            observer.end_answer(report)
