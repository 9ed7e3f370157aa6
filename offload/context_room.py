"""Room for a context that grows past what was planned: expert slots are given up for it, and come back after it."""

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import nn
from transformers import Cache

from moe_offload.errors import BudgetError
from moe_offload.offload.decode.kv_room import SPARE_TOKENS
from moe_offload.offload.experts.residency import Residency
from moe_offload.offload.graphs.answer_cache import AnswerCache
from moe_offload.offload.graphs.answer_layers import KeptMemory
from moe_offload.offload.pass_inputs import pass_tokens
from moe_offload.offload.planning.kv_cache import cache_bytes_per_layer
from moe_offload.offload.planning.plan import Plan
from moe_offload.offload.planning.sizes import format_size
from moe_offload.offload.planning.slot_shares import SlotNeed, fill_slots, slots_bytes
from moe_offload.offload.planning.workspace import workspace_bytes

# Slots are given up for so many tokens at a time, or an eighth of the context: moving them costs more than a step.
_AT_ONCE_TOKENS = 256


@dataclass(frozen=True)
class _Device:
    """What shares one budget: layers with experts, and layers with a cache."""

    layers: tuple[int, ...]
    cache_layers: tuple[int, ...]
    room_bytes: int
    """What was planned for context and workspace, and what was left of the budget."""
    workspace_bytes: int


class ContextRoom:
    """Looks at every forward pass before it begins, and resizes layers then: never in the middle of a step.

    Caches are counted as long as they live, also where several texts are under way. While another thread is in a pass,
    layers keep their slots until a later one. Raises BudgetError where a text is longer than was planned, and all slots
    but one a layer would not make room for it.
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
        self._in_pass: set[int] = set()  # threads
        self._lock = threading.Lock()
        self._at_once_tokens = max(1, min(_AT_ONCE_TOKENS, plan.context_tokens // 8))
        self._cache_bytes = lru_cache(64)(self._cache_bytes_of)
        model.register_forward_pre_hook(self._before_pass, with_kwargs=True)
        model.forward = self._leaving(model.forward)

    def _leaving(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward, after which its thread is in no pass: however it ends, and no hook sees an interrupt."""

        @wraps(forward)
        def leaving(*args: Any, **kwargs: Any) -> Any:
            try:
                return forward(*args, **kwargs)
            finally:
                self._in_pass.discard(threading.get_ident())

        return leaving

    def _before_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with self._lock:
            self._in_pass.add(threading.get_ident())
            try:
                self._look(pass_tokens(args, kwargs), kwargs.get("past_key_values"))
            except BaseException:  # then no pass follows
                self._in_pass.discard(threading.get_ident())
                raise

    # -- the lock is held --

    def _look(self, tokens: torch.Tensor | None, cache: Cache | None) -> None:
        if tokens is None or tokens.dim() < 2:
            return
        texts = self._texts(tokens.shape[0], tokens.shape[1], cache)
        if texts or self._behind or self._num_slots != list(self._plan.num_slots):
            self._make_room(texts, *tokens.shape[:2])

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
        is_planned = len(texts) == 1 and texts[0][0] == 1 and texts[0][1] <= self._plan.context_tokens
        return [] if is_planned else texts

    def _make_room(self, texts: Sequence[tuple[int, int]], batch_size: int, num_new: int) -> None:
        for device, needed_bytes in zip(self._devices, self._needed_bytes(texts, batch_size, num_new), strict=True):
            slots = self._slots_beside(device, max(0, needed_bytes - device.room_bytes), texts)
            for layer_idx, num_slots in zip(device.layers, slots, strict=True):
                if num_slots != self._num_slots[layer_idx]:
                    self._num_slots[layer_idx] = num_slots
                    self._behind.add(layer_idx)
        if len(self._in_pass) > 1:
            self._in_pass &= {thread.ident for thread in threading.enumerate() if thread.ident is not None}
        if len(self._in_pass) > 1:
            return
        # Those that give up slots first, so that there is memory for those that get some.
        now = self._residency.cache.num_slots
        for layer_idx in sorted(self._behind, key=lambda layer_idx: self._num_slots[layer_idx] - now(layer_idx)):
            self._resize(layer_idx)

    def _resize(self, layer_idx: int) -> None:
        num_slots = self._num_slots[layer_idx]
        if num_slots < self._residency.cache.num_slots(layer_idx):
            self._moved()  # what is recorded holds on to memory that the smaller slab may need
        try:
            if not self._residency.resize(layer_idx, num_slots):
                return
        except BudgetError:
            if num_slots < self._residency.cache.num_slots(layer_idx):
                raise
            return  # there is no memory for more yet
        self._behind.discard(layer_idx)
        self._moved()

    def _slots_beside(self, device: _Device, excess_bytes: int, texts: Sequence[tuple[int, int]]) -> list[int]:
        """The slots of each layer on a device that has to do without so many bytes."""
        planned = [self._plan.num_slots[layer_idx] for layer_idx in device.layers]
        if not excess_bytes:
            return planned
        sizes = [self._plan.slot_bytes[layer_idx] for layer_idx in device.layers]
        needs = [SlotNeed(slots, size, 1) for slots, size in zip(planned, sizes, strict=True)]
        room_bytes = slots_bytes(needs, planned) - excess_bytes
        floor_bytes = slots_bytes(needs, [1] * len(needs))
        if room_bytes < floor_bytes:
            longest = max(num_tokens for _, num_tokens in texts)
            if longest <= self._plan.context_tokens:  # many short texts: as much as there is
                return [1] * len(needs)
            option = "--ram" if self._plan.device == "cpu" else "--vram"
            raise BudgetError(
                f"the context has grown to {longest} tokens, "
                f"{self._plan.context_tokens} were planned: it needs {format_size(excess_bytes)} more, of which all "
                f"expert slots but one a layer give {format_size(room_bytes + excess_bytes - floor_bytes)}; load the "
                f"model with --context {longest} and more {option}, or shorten the text",
                needed_bytes=excess_bytes,
                budget_bytes=room_bytes + excess_bytes - floor_bytes,
            )
        return fill_slots(needs, room_bytes)

    def _needed_bytes(self, texts: Sequence[tuple[int, int]], batch_size: int, num_new: int) -> list[int]:
        """Bytes of context on each device, and of the pass that begins: so many new tokens of so many texts."""
        if not texts:
            return [0] * len(self._devices)
        rounded = [(batch_size, -(-num_tokens // self._at_once_tokens)) for batch_size, num_tokens in texts]
        caches = [self._cache_bytes(batch_size, pieces) for batch_size, pieces in rounded]
        longest = max(pieces for _, pieces in rounded) * self._at_once_tokens
        workspace = self._workspace(batch_size, min(num_new, longest), longest)
        return [
            sum(cache[layer_idx] for cache in caches for layer_idx in device.cache_layers)
            + max(workspace, device.workspace_bytes)
            for device in self._devices
        ]

    def _cache_bytes_of(self, batch_size: int, pieces: int) -> list[int]:
        return cache_bytes_per_layer(
            self._config,
            context_tokens=pieces * self._at_once_tokens + self._spare_tokens,
            batch_size=batch_size,
            dtype_bytes=self._dtype_bytes,
            chunk_tokens=self._plan.prefill_chunk_tokens,
        )

    def _workspace(self, batch_size: int, chunk_tokens: int, context_tokens: int) -> int:
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
    room_bytes = left_bytes + plan.kv_bytes + plan.workspace_bytes
    return [_Device(layers, tuple(range(plan.num_cache_layers)), room_bytes, plan.workspace_bytes)]
