"""Takes notes of what a model does, by the threads that do it; blocks of a trace are made of them elsewhere."""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moe_offload.cache import Admit, EventKind, Lease
from moe_offload.offload.reports import RunReport
from moe_offload.offload.tracing.copies import CopyLog
from moe_offload.offload.tracing.passes import ABORTED, FINISHED, OPEN, EventNote, LayerNote, PassNote
from moe_offload.offload.tracing.transfers import TransferLog

# Plain numbers: members of an enumeration are slow to make arrays of.
_ACQUIRE, _ACQUIRE_IF_HOTTER = int(EventKind.ACQUIRE), int(EventKind.ACQUIRE_IF_HOTTER)


class _Thread:
    """Where a thread is."""

    def __init__(self) -> None:
        self.answering = False  # between the beginning and the end of an answer
        self.answer_begin_ns = 0
        self.sequence = -1
        self.in_prompt = True
        self.running: PassNote | None = None
        self.module: Any = None  # whose forward pass is running
        self.finished: PassNote | None = None  # but for the time until the next one
        self.layer: LayerNote | None = None
        self.router_ns = 0
        self.before_ns = 0


class Recorder:
    """A `CacheObserver` and a `StepObserver`. Its methods only append to lists: nothing here waits for a disk."""

    def __init__(self, is_prefill: Callable[[], bool], *, tokens: bool = False) -> None:
        """``is_prefill``: whether this thread's pass is a prompt; ``tokens``: note the ids of tokens too."""
        self.transfers = TransferLog()
        self.copies = CopyLog()
        self.begin_ns = time.perf_counter_ns()
        self.answers: list[dict[str, Any]] = []
        self._is_prefill, self._tokens = is_prefill, tokens
        self._local = threading.local()
        self._lock = threading.Lock()
        self._threads: list[_Thread] = []
        self._num_sequences = self._num_tokens = self._num_steps = 0
        self._passes: deque[PassNote] = deque()
        self._events: deque[EventNote] = deque()

    def _here(self) -> _Thread:
        try:
            thread: _Thread = self._local.thread
        except AttributeError:
            thread = self._local.thread = _Thread()
            with self._lock:
                self._threads.append(thread)
        return thread

    # -- passes --

    def begin_pass(self, module: Any, tokens: torch.Tensor | None) -> None:
        """``tokens``: ids ``[B, S]`` or embeddings ``[B, S, H]``, as far as they are known."""
        here, now_ns = self._here(), time.perf_counter_ns()
        if here.running is not None:
            if here.module is not module:  # an encoder within its model
                return
            self._abort(here)
        batch, length = (tokens.shape[0], tokens.shape[1]) if tokens is not None and tokens.dim() > 1 else (1, 1)
        # Who is answering is at its prompt until a pass has one token; else a pass of several is a text of its own.
        is_first = here.sequence < 0
        is_prompt = self._is_prefill() or is_first or (length > 1 and (here.in_prompt or not here.answering))
        self._finish(here, now_ns if here.answering or not is_prompt else None)
        if is_first or (is_prompt and not here.answering):
            here.sequence = self._new_sequences(batch)
        here.in_prompt = is_prompt
        note = PassNote(now_ns, here.answer_begin_ns or now_ns, here.sequence, is_prompt, batch)
        note.num_tokens = batch * length
        here.running, here.module, here.layer, here.answer_begin_ns = note, module, None, 0
        if self._tokens and tokens is not None and not tokens.is_floating_point():
            note.token_ids = tokens
        here.router_ns, here.before_ns = 0, now_ns

    def end_pass(self, module: Any) -> None:
        """The module's forward has returned."""
        here = self._here()
        if here.running is None or here.module is not module:
            return
        note, here.running, here.module, here.layer = here.running, None, None, None
        note.end_ns = time.perf_counter_ns()
        here.finished = note

    def _abort(self, here: _Thread) -> None:
        if here.running is not None:
            here.running.state = ABORTED
            here.running = here.module = here.layer = None

    def _finish(self, here: _Thread, now_ns: int | None) -> None:
        """The pass before is over, with what came after it, at ``now_ns``, or when it returned."""
        note, here.finished = here.finished, None
        if note is None:
            return
        note.step_end_ns = note.end_ns if now_ns is None else now_ns
        rows = Counter[int]()
        for layer in note.layers:
            rows[layer.layer_idx] += layer.num_rows
        note.num_tokens = max([note.num_tokens, *rows.values()])
        note.has_each_layer_once = len(rows) == len(note.layers)
        with self._lock:
            note.first_token, note.step = self._num_tokens, self._num_steps
            self._num_tokens += note.num_tokens
            self._num_steps += 1
            self._passes.append(note)
            note.state = FINISHED

    def _new_sequences(self, count: int) -> int:
        with self._lock:
            first = self._num_sequences
            self._num_sequences += count
            return first

    def end_answer(self, report: RunReport) -> None:
        """The answer that this thread was at has ended."""
        here = self._here()
        self._abort(here)
        self._finish(here, time.perf_counter_ns())
        here.answering = False
        if here.sequence < 0:
            return
        with self._lock:
            self.answers.append(
                {
                    "sequence": here.sequence,
                    "prompt_tokens": report.prompt_tokens,
                    "new_tokens": report.new_tokens,
                    "time_to_first_token_s": report.time_to_first_token_s,
                    "decode_s": report.decode_s,
                }
            )

    # -- layers: see StepObserver --

    def router_called(self) -> None:
        """A router has been called, not by lookahead."""
        self._here().router_ns = time.perf_counter_ns()

    def begin_layer(self, layer_idx: int, top_k_index: torch.Tensor | None, top_k_weights: torch.Tensor | None) -> None:
        here = self._here()
        if here.running is None:
            return
        here.layer = LayerNote(
            layer_idx, here.before_ns, here.router_ns, time.perf_counter_ns(), top_k_index, top_k_weights
        )
        here.running.layers.append(here.layer)
        here.router_ns = 0

    def end_layer(self) -> None:
        here = self._here()
        if here.layer is not None:
            here.before_ns = here.layer.end_ns = time.perf_counter_ns()
            here.layer = None

    def guessed(self, layer_idx: int, expert_idx: int, arrived: bool) -> None:
        self.transfers.used((layer_idx, expert_idx), arrived)
        layer = self._here().layer
        if layer is not None:
            layer.guesses.append((expert_idx, arrived))

    def waited(self, duration_ns: int) -> None:
        layer = self._here().layer
        if layer is not None:
            layer.wait_ns += duration_ns

    def look_ahead(self, issued: Callable[[], None]) -> None:
        begin_ns = time.perf_counter_ns()
        issued()
        layer = self._here().layer
        if layer is not None:
            layer.ahead_ns += time.perf_counter_ns() - begin_ns

    def predicted(self, layer_idx: int, target_idx: int, expert_ids: Sequence[int], top_k_index: torch.Tensor) -> None:
        running = self._here().running
        if running is not None:
            running.predictions.append((target_idx, target_idx - layer_idx, list(expert_ids), top_k_index))

    # -- the cache: see CacheObserver --

    def acquired(self, lease: Lease, expert_ids: Sequence[int], weights: Sequence[float] | None, admit: Admit) -> None:
        here = self._here()
        layer = here.layer
        kind = _ACQUIRE_IF_HOTTER if admit is Admit.IF_HOTTER else _ACQUIRE
        ids, given = list(expert_ids), None if weights is None else list(weights)
        self._events.append(EventNote(kind, lease.layer_idx, ids, given, here.running, layer))
        if layer is not None:
            layer.expert_ids, layer.weights_given = ids, given
            # Not the lease itself: who keeps it keeps the slots of a step that was interrupted.
            layer.leases.append((lease.hits, lease.misses, lease.bypassed, lease.prefetched))
        for expert_idx in lease.prefetched:
            arrived = not any(hit.loading for hit in lease.hits if hit.expert_idx == expert_idx)
            self.transfers.used((lease.layer_idx, expert_idx), arrived)

    def told(self, kind: EventKind, layer_idx: int, expert_ids: Sequence[int]) -> None:
        if kind is EventKind.NEW_SEQUENCE:
            here = self._here()
            self._abort(here)
            self._finish(here, None)
            here.answering = here.in_prompt = True
            here.answer_begin_ns = time.perf_counter_ns()
            here.sequence = -1
        elif kind is EventKind.WARM:
            for expert_idx in expert_ids:
                self.transfers.warming((layer_idx, expert_idx))
        self._events.append(EventNote(int(kind), layer_idx, list(expert_ids)))

    # -- what was noted --

    def take(self, *, last: bool = False) -> tuple[list[PassNote], list[EventNote]]:
        """What is complete since the last call, in order; ``last``: and whatever else there is."""
        if last:
            with self._lock:
                threads = list(self._threads)
            for thread in threads:
                self._abort(thread)
                self._finish(thread, None)
        events = []
        while self._events:
            owner = self._events[0].owner
            if owner is not None and owner.state == OPEN and not last:
                break
            events.append(self._events.popleft())
        # After the events, so that the tokens they belong to are there with them.
        return [self._passes.popleft() for _ in range(len(self._passes))], events
