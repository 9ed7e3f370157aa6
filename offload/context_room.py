"""Room for a text that needs more than slots leave it: some are given up for it, and come back after it."""

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any

from torch import nn
from transformers import Cache

from moe_offload.errors import BudgetError
from moe_offload.offload.decode.kv_room import SPARE_TOKENS
from moe_offload.offload.experts.residency import Residency
from moe_offload.offload.freed_memory import return_freed_memory
from moe_offload.offload.graphs.answer_cache import AnswerCache
from moe_offload.offload.graphs.answer_layers import KeptMemory
from moe_offload.offload.pass_inputs import LONGEST_DRAFT_TOKENS, pass_tokens
from moe_offload.offload.planning.kv_cache import cache_bytes_per_layer
from moe_offload.offload.planning.plan import Plan
from moe_offload.offload.planning.room import tokens_at_once
from moe_offload.offload.planning.sizes import format_size
from moe_offload.offload.planning.slot_shares import fewer_slots
from moe_offload.offload.planning.workspace import workspace_bytes

# Slots in RAM are given up in the middle of others' passes; a step that holds one ends soon, and so does a read.
_LONGEST_WAIT_S, _POLL_S = 2.0, 0.001


@dataclass(frozen=True)
class _Device:
    """What shares one budget: layers with experts, and layers with a cache."""

    layers: tuple[int, ...]
    cache_layers: tuple[int, ...]
    room_bytes: int
    """What is there for context and workspace beside all slots, and what is left of the budget."""
    workspace_bytes: int


class ContextRoom:
    """Looks at every forward pass before it begins, and resizes layers then: never in the middle of a step.

    What a text needs is the memory of all caches that are alive, and the temporaries of the passes that are under way.
    Slots are given up for it before a pass, the coldest first; empty ones come back with a pass that is no prompt, so
    that pieces of a prompt do not move them to and fro. While another thread is in a pass, layers on a GPU keep their
    slots until a later one. Raises BudgetError where a text is longer than was planned, and all slots but one a layer
    would not make room for it.
    """

    def __init__(self, model: nn.Module, plan: Plan, residency: Residency, *, moved: Callable[[], None]) -> None:
        """``moved`` is called after slots have moved, and before any are given up."""
        self._config: Any = model.config
        self._plan, self._residency, self._moved = plan, residency, moved
        self._dtype_bytes = next(p.dtype.itemsize for p in model.parameters() if p.is_floating_point())
        self._spare_tokens = SPARE_TOKENS if plan.device == "cpu" else 0
        self._devices = _devices(plan)
        self._tokens: weakref.WeakKeyDictionary[Cache | KeptMemory, tuple[int, int]] = weakref.WeakKeyDictionary()
        self._num_slots = list(plan.num_slots)  # what layers are to have
        self._behind: set[int] = set()  # layers that have not got it yet
        self._in_pass: dict[int, tuple[int, int]] = {}  # thread -> texts, and new tokens of each
        self._lock = threading.Lock()
        # Drafts of every length count alike.
        self._least_new = min(plan.room.pass_tokens, LONGEST_DRAFT_TOKENS) if plan.gives_way else 1
        self._at_once_tokens = tokens_at_once(plan.context_tokens)
        self._cache_bytes = lru_cache(64)(self._cache_bytes_of)
        self._workspace = lru_cache(64)(self._workspace_of)
        self._fewer_slots = lru_cache(64)(self._fewer_slots_of)
        model.register_forward_pre_hook(self._before_pass, with_kwargs=True)
        model.forward = self._leaving(model.forward)

    def _leaving(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward, after which its thread is in no pass: however it ends, and no hook sees an interrupt."""

        @wraps(forward)
        def leaving(*args: Any, **kwargs: Any) -> Any:
            try:
                return forward(*args, **kwargs)
            finally:
                self._in_pass.pop(threading.get_ident(), None)

        return leaving

    def _before_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens, thread = pass_tokens(args, kwargs), threading.get_ident()
        batch_size, num_new = (0, 0) if tokens is None or tokens.dim() < 2 else (tokens.shape[0], tokens.shape[1])
        with self._lock:
            self._in_pass[thread] = batch_size, num_new
            try:
                if batch_size:
                    self._look(batch_size, num_new, kwargs.get("past_key_values"))
            except BaseException:  # then no pass follows
                self._in_pass.pop(thread, None)
                raise

    # -- the lock is held --

    def _look(self, batch_size: int, num_new: int, cache: Cache | None) -> None:
        if len(self._in_pass) > 1:
            for dead in set(self._in_pass) - {thread.ident for thread in threading.enumerate()}:
                self._in_pass.pop(dead, None)
        texts = self._texts(batch_size, num_new, cache)
        if texts or self._behind or self._num_slots != list(self._plan.num_slots):
            self._make_room(texts, is_prompt=self._plan.gives_way and num_new > LONGEST_DRAFT_TOKENS)

    def _texts(self, batch_size: int, num_new: int, cache: Cache | None) -> list[tuple[int, int]]:
        """Size and tokens of each batch that is in memory; none where it is the one text that was planned."""
        if isinstance(cache, AnswerCache):
            # Those of all sizes share the memory of the context that was planned, rounded up as kernels want it.
            self._tokens[cache.memory] = (batch_size, min(cache.memory.max_tokens, self._plan.context_tokens))
        elif isinstance(cache, Cache):
            self._tokens[cache] = (batch_size, _tokens_of(cache, num_new))
        texts = list(self._tokens.values())
        if not isinstance(cache, Cache):  # the model makes one in this pass, which then comes back with the next
            texts.append((batch_size, num_new))
        room = self._plan.room
        is_planned = len(texts) == 1 and texts[0][0] == 1 and texts[0][1] <= room.text_tokens
        if self._plan.gives_way:
            is_planned &= len(self._in_pass) == 1 and num_new <= room.pass_tokens
        return [] if is_planned else texts

    def _make_room(self, texts: Sequence[tuple[int, int]], *, is_prompt: bool) -> None:
        come_back = False
        for device_idx, needed_bytes in enumerate(self._needed_bytes(texts)):
            device = self._devices[device_idx]
            slots = self._slots_beside(device_idx, max(0, needed_bytes - device.room_bytes), texts)
            for layer_idx, num_slots in zip(device.layers, slots, strict=True):
                if num_slots < self._num_slots[layer_idx] or (num_slots > self._num_slots[layer_idx] and not is_prompt):
                    come_back |= num_slots > self._num_slots[layer_idx]
                    self._num_slots[layer_idx] = num_slots
                    self._behind.add(layer_idx)
        if come_back:  # into the memory of a text that is gone, which may lie between blocks that are in use
            return_freed_memory()
        if self._plan.device == "cuda" and len(self._in_pass) > 1:
            return
        # Those that give up slots first, so that there is memory for those that get some.
        now = self._residency.cache.num_slots
        until_s = time.monotonic() + _LONGEST_WAIT_S
        for layer_idx in sorted(self._behind, key=lambda layer_idx: self._num_slots[layer_idx] - now(layer_idx)):
            self._resize(layer_idx, until_s)

    def _resize(self, layer_idx: int, until_s: float) -> None:
        num_slots = self._num_slots[layer_idx]
        is_fewer = num_slots < self._residency.cache.num_slots(layer_idx)
        if is_fewer:
            self._moved()  # what is recorded holds on to memory that the smaller slab may need
        try:
            while not self._residency.resize(layer_idx, num_slots):
                if not is_fewer or self._plan.device == "cuda" or time.monotonic() > until_s:
                    return
                self._residency.cancel_prefetches(layer_idx, ())
                time.sleep(_POLL_S)
        except BudgetError:
            if num_slots < self._residency.cache.num_slots(layer_idx):
                raise
            return  # there is no memory for more yet
        self._behind.discard(layer_idx)
        self._moved()

    def _slots_beside(self, device_idx: int, excess_bytes: int, texts: Sequence[tuple[int, int]]) -> Sequence[int]:
        """The slots of each layer on a device that has to do without so many bytes."""
        device = self._devices[device_idx]
        if not excess_bytes:
            return [self._plan.num_slots[layer_idx] for layer_idx in device.layers]
        given_bytes = self._plan.slots_bytes(device.layers)
        floor_bytes = sum(self._plan.slot_bytes[layer_idx] for layer_idx in device.layers)
        if given_bytes - excess_bytes < floor_bytes:
            longest = max(num_tokens for _, num_tokens in texts)
            if longest <= self._plan.context_tokens:  # many short texts: as much as there is
                return [1] * len(device.layers)
            option = "--ram" if self._plan.device == "cpu" else "--vram"
            raise BudgetError(
                f"the context has grown to {longest} tokens, "
                f"{self._plan.context_tokens} were planned: it needs {format_size(excess_bytes)} more, of which all "
                f"expert slots but one a layer give {format_size(given_bytes - floor_bytes)}; load the "
                f"model with --context {longest} and more {option}, or shorten the text",
                needed_bytes=excess_bytes,
                budget_bytes=given_bytes - floor_bytes,
            )
        return self._fewer_slots(device_idx, given_bytes - excess_bytes)

    def _fewer_slots_of(self, device_idx: int, slots_bytes: int) -> list[int]:
        layers = self._devices[device_idx].layers
        return fewer_slots(
            [self._plan.slot_bytes[layer_idx] for layer_idx in layers],
            [self._plan.num_slots[layer_idx] for layer_idx in layers],
            slots_bytes,
        )

    def _needed_bytes(self, texts: Sequence[tuple[int, int]]) -> list[int]:
        """Bytes of context on each device, and of the passes under way."""
        if not texts:
            return [0] * len(self._devices)
        rounded = [(batch_size, self._rounded(num_tokens)) for batch_size, num_tokens in texts]
        caches = [self._cache_bytes(batch_size, num_tokens) for batch_size, num_tokens in rounded]
        longest = max(num_tokens for _, num_tokens in rounded)
        passes = [self._in_pass[threading.get_ident()]]
        if self._plan.gives_way:
            passes = list(self._in_pass.values())
        workspace = sum(
            self._workspace(batch_size, max(num_new, self._least_new), longest)
            for batch_size, num_new in passes
            if batch_size
        )
        return [
            sum(cache[layer_idx] for cache in caches for layer_idx in device.cache_layers)
            + max(workspace, device.workspace_bytes)
            for device in self._devices
        ]

    def _rounded(self, num_tokens: int) -> int:
        """Up, but by that alone never above the context that was planned."""
        rounded = -(-num_tokens // self._at_once_tokens) * self._at_once_tokens
        return min(rounded, self._plan.context_tokens) if num_tokens <= self._plan.context_tokens else rounded

    def _cache_bytes_of(self, batch_size: int, num_tokens: int) -> list[int]:
        return cache_bytes_per_layer(
            self._config,
            context_tokens=num_tokens + self._spare_tokens,
            batch_size=batch_size,
            dtype_bytes=self._dtype_bytes,
            chunk_tokens=self._plan.prefill_chunk_tokens,
        )

    def _workspace_of(self, batch_size: int, chunk_tokens: int, context_tokens: int) -> int:
        return workspace_bytes(
            self._config,
            batch_size=batch_size,
            chunk_tokens=chunk_tokens,
            context_tokens=context_tokens,
            dtype_bytes=self._dtype_bytes,
            expert_rows=self._plan.expert_rows,
        )


def _tokens_of(cache: Cache, num_new: int) -> int:
    """Tokens that a cache has memory for, once a pass with so many new ones is over."""
    if not cache.is_compileable:
        return int(cache.get_seq_length()) + num_new
    # One of fixed size takes all of it at once; how much of that is in use, only the device may know.
    own = getattr(cache, "self_attention_cache", cache)  # a decoder's, beside what it sees of its encoder
    return max(int(getattr(layer, "max_cache_len", 0)) for layer in own.layers)


def _devices(plan: Plan) -> list[_Device]:
    """What the plan gave to each device."""
    if plan.parts:
        return [
            _Device(
                part.layers,
                part.cache_layers,
                part.vram_bytes
                - part.fixed_bytes
                + part.kv_bytes
                + part.workspace_bytes
                - plan.slots_bytes(part.layers),
                part.workspace_bytes,
            )
            for part in plan.parts
        ]
    budget_bytes = plan.ram_bytes if plan.vram_bytes is None else plan.vram_bytes
    left_bytes = max(0, budget_bytes - plan.total_bytes("RAM" if plan.vram_bytes is None else "VRAM"))
    layers = tuple(range(len(plan.num_slots)))
    room_bytes = left_bytes + plan.room.total_bytes
    return [_Device(layers, tuple(range(plan.num_cache_layers)), room_bytes, plan.room.workspace_bytes)]
