"""One answer: transformers' ``generate`` with a clock, a stop switch and a report around it."""

import copy
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import (
    BatchEncoding,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from moe_offload.cache import PrefetchCounts, StatsSnapshot
from moe_offload.errors import ConfigError
from moe_offload.offload.experts.layer import StepState, StoppedError
from moe_offload.offload.experts.lookahead import Lookahead, LookaheadCounts
from moe_offload.offload.experts.residency import Residency
from moe_offload.offload.reports import RunReport


class _Clock(StoppingCriteria):  # type: ignore[misc]
    """Called after every token: notes the time and the tokens so far, and stops when it is told to."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self.begin_s = time.perf_counter()
        self.first_s = self.last_s = self.begin_s
        self.num_tokens = 0
        self.ids = torch.empty(1, 0, dtype=torch.long)

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.last_s = time.perf_counter()
        if self.num_tokens == 0:
            self.first_s = self.last_s
        self.num_tokens += 1
        self.ids = input_ids
        return torch.full((input_ids.shape[0],), self.stopped.is_set(), device=input_ids.device)


class _Replay(LogitsProcessor):  # type: ignore[misc]
    """Makes the next token the one that is given, whatever the model would say."""

    def __init__(self, token_ids: list[int]) -> None:
        self._token_ids = iter(token_ids)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, next(self._token_ids)] = torch.inf
        return scores


class _WatchedClock(_Clock):
    """Tells after every token how many there are."""

    def __init__(self, watch: Callable[[int], None]) -> None:
        super().__init__()
        self._watch = watch

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done = super().__call__(input_ids, scores, **kwargs)
        self._watch(self.num_tokens)
        return done


class Reading(NamedTuple):
    """All counts at one moment."""

    cache: StatsSnapshot
    guesses: PrefetchCounts
    prefetch_used_bytes: int
    prefetch_wasted_bytes: int
    bytes_read: int
    bytes_copied: int
    stall_s: float
    num_warmed: int
    lookahead: LookaheadCounts


class Meter:
    """What residency and lookahead have counted, and the difference between two moments."""

    def __init__(self, residency: Residency, lookahead: Lookahead) -> None:
        self.residency, self._lookahead = residency, lookahead

    def read(self) -> Reading:
        """The counts now."""
        residency = self.residency
        return Reading(
            cache=residency.cache.stats.snapshot(),
            guesses=residency.guesses.counts,
            prefetch_used_bytes=residency.prefetch_used_bytes,
            prefetch_wasted_bytes=residency.prefetch_wasted_bytes,
            bytes_read=residency.bytes_read,
            bytes_copied=residency.bytes_copied,
            stall_s=residency.stall_s,
            num_warmed=residency.num_warmed,
            lookahead=self._lookahead.counts,
        )

    def since(self, earlier: Reading, **times: Any) -> RunReport:
        """The figures of what has happened since ``earlier``, with the tokens and times given."""
        return self.between(earlier, self.read(), **times)

    @staticmethod
    def between(earlier: Reading, later: Reading, **times: Any) -> RunReport:
        """The same between two readings."""
        counts = later.cache.diff(earlier.cache)
        guesses = later.guesses - earlier.guesses
        prefetch = counts.prefetch + guesses
        guessed = guesses.used + guesses.late  # to the cache they were misses: it does not know of staging
        return RunReport(
            hits=counts.total.hits + guessed,
            misses=counts.total.misses + counts.total.bypassed - guessed,
            bytes_read=later.bytes_read - earlier.bytes_read,
            bytes_copied=later.bytes_copied - earlier.bytes_copied,
            stall_s=later.stall_s - earlier.stall_s,
            prefetch_issued=prefetch.issued,
            prefetch_used=prefetch.used + prefetch.late,
            prefetch_late=prefetch.late,
            prefetch_wasted=prefetch.wasted,
            prefetch_used_bytes=later.prefetch_used_bytes - earlier.prefetch_used_bytes,
            prefetch_wasted_bytes=later.prefetch_wasted_bytes - earlier.prefetch_wasted_bytes,
            prefetch_recall=(later.lookahead - earlier.lookahead).recall,
            warmed=later.num_warmed - earlier.num_warmed,
            **times,
        )


# Special tokens that say what is reasoning and what is answer (DeepSeek and Qwen, Mistral, gpt-oss).
REASONING_MARKERS = (
    *("<think>", "</think>", "[THINK]", "[/THINK]"),
    *("<|channel|>", "<|message|>", "<|start|>", "<|end|>"),
)


class _Streamer(TextIteratorStreamer):  # type: ignore[misc]
    """Text as it is made, without special tokens; an error of the generating thread reaches the reader."""

    def __init__(self, tokenizer: Any, *, skip_prompt: bool, keep_reasoning_markers: bool) -> None:
        super().__init__(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=False)
        kept = REASONING_MARKERS if keep_reasoning_markers else ()
        self._hidden = torch.tensor(
            [i for i in tokenizer.all_special_ids if tokenizer.convert_ids_to_tokens(i) not in kept], dtype=torch.long
        )

    def put(self, value: torch.Tensor) -> None:
        """Token ids ``[n]`` or ``[1, n]``, the prompt's first."""
        if self.skip_prompt and self.next_tokens_are_prompt:
            super().put(value)
            return
        shown = value.reshape(-1)
        shown = shown[~torch.isin(shown, self._hidden)]
        if len(shown):
            super().put(shown)

    def fail(self, error: BaseException) -> None:
        self.text_queue.put(error)

    def __next__(self) -> str:
        value = self.text_queue.get()
        if isinstance(value, BaseException):
            raise value
        if value == self.stop_signal:
            raise StopIteration
        return str(value)


def sampling_config(
    defaults: GenerationConfig,
    *,
    max_new_tokens: int,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
) -> GenerationConfig:
    """A generation config that samples at ``temperature``, or is greedy without one; `ConfigError` for bad values."""
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}; it must be 1 or more")
    if temperature is not None and not 0 <= temperature <= 100:
        raise ConfigError(f"temperature is {temperature}; it must be from 0 (greedy) to 100")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p is {top_p}; it must be above 0 and at most 1")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k is {top_k}; it must be 1 or more")
    config = copy.deepcopy(defaults)
    config.max_new_tokens, config.max_length = max_new_tokens, None
    config.do_sample = bool(temperature)
    config.temperature, config.top_p, config.top_k = (temperature, top_p, top_k) if temperature else (None, None, None)
    config.min_p = config.typical_p = None
    config.num_beams = 1
    return config


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
    ) -> None:
        self._model, self._tokenizer, self._meter, self._step = model, tokenizer, meter, step
        self._context_tokens, self._chunk_tokens = context_tokens, chunk_tokens
        # Weak: an interrupt may strike between the beginning of an answer and the code that sees to its end.
        self._running: weakref.WeakSet[_Clock] = weakref.WeakSet()
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
        new_tokens = self._run(inputs, seed, sampling, None, self._begin())
        text: str = self._tokenizer.decode(new_tokens, skip_special_tokens=True)
        return text

    def stream(
        self, inputs: Any, *, keep_reasoning_markers: bool = False, seed: int | None = None, **sampling: Any
    ) -> Iterator[str]:
        """The answer in pieces of text. Leaving the iterator early stops it."""
        streamer = _Streamer(
            self._tokenizer,
            skip_prompt=not self._model.config.is_encoder_decoder,
            keep_reasoning_markers=keep_reasoning_markers,
        )
        clock = self._begin()

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
        clock = _WatchedClock(watch)
        with self._lock:
            self._running.add(clock)
        inputs = BatchEncoding({"input_ids": prompt_ids, "attention_mask": torch.ones_like(prompt_ids)})
        greedy = {"max_new_tokens": len(token_ids), "temperature": None, "top_p": None, "top_k": None}
        self._run(inputs, None, greedy, None, clock, [_Replay(token_ids)])
        assert self.last_run is not None
        return self.last_run

    def _begin(self) -> _Clock:
        """The clock of an answer, which `stop` reaches from now on."""
        clock = _Clock()
        with self._lock:
            self._running.add(clock)
        return clock

    def _run(
        self,
        inputs: Any,
        seed: int | None,
        sampling: dict[str, Any],
        streamer: Any,
        clock: _Clock,
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
            with torch.inference_mode(), self._step.stoppable(clock.stopped):
                output: torch.Tensor = self._model.generate(
                    **inputs.to(self._model.device),
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

    def _may_chunk(self, prompt_tokens: int) -> bool:
        """A long prompt goes through in pieces, unless the model carries a state that its pieces would not pass on."""
        model = self._model
        return (
            prompt_tokens > self._chunk_tokens
            and not model.config.is_encoder_decoder
            and not getattr(model, "_is_stateful", False)
        )

    def _report(self, clock: _Clock, prompt_tokens: int, earlier: Any) -> None:
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
            self.last_run = report
            self.prompt_tokens += report.prompt_tokens
            self.new_tokens += report.new_tokens
            self.time_to_first_token_s += report.time_to_first_token_s
            self.decode_s += report.decode_s
