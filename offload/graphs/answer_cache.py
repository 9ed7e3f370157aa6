"""The cache of one answer after the other: keys, values and states in memory that stays where it is."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig, StaticCache
from transformers.cache_utils import get_layer_types_and_kwargs

from moe_offload.offload.graphs.answer_layers import (
    AnswerLayer,
    AnswerNothing,
    AnswerState,
    AnswerWindow,
    Counts,
    KeptMemory,
)

SMALLEST_TOKENS = 256
_ALIGNED_TOKENS = 8  # attention kernels want masks whose rows begin at multiples of 16 bytes
_KINDS = ("full_attention", "sliding_attention", "linear_attention", "conv", "dummy")


class AnswerCache(StaticCache):  # type: ignore[misc]
    """The cache of an answer that may reach ``max_tokens``."""

    def __init__(self, config: PreTrainedConfig, max_tokens: int, memory: KeptMemory) -> None:
        """For a config that is `supported`."""
        super().__init__(config=config, max_cache_len=max_tokens)
        kinds = zip(*get_layer_types_and_kwargs(config.get_text_config(decoder=True)), strict=True)
        self.layers = [_layer(kind, kwargs, memory, idx, max_tokens) for idx, (kind, kwargs) in enumerate(kinds)]
        self.memory = memory  # that of others too, of other sizes
        self._kept_counts: list[Counts] = []

    @staticmethod
    def supported(config: PreTrainedConfig) -> bool:
        """Whether all layers attend in full, in a sliding window or by a state, and to nothing but their text."""
        if config.is_encoder_decoder:
            return False
        kinds, _ = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        return set(kinds) <= set(_KINDS)

    @property
    def phase(self) -> tuple[str, ...]:
        """A step recorded in one phase is good for all of it."""
        return tuple(layer.phase for layer in self.layers)

    def count_step(self) -> None:
        """A step that is replayed adds a token to every layer on the device: know it on the host too."""
        for layer in self.layers:
            layer.count_step()

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Around a step whose code runs while the device only records: the host forgets that it has run."""
        counts = [layer.counts for layer in self.layers]
        try:
            yield
        finally:
            self._set_counts(counts)

    def keep(self) -> None:
        """Before a step of one token that may be undone: lengths and states are copied, in a few launches."""
        state = self._state()
        torch._foreach_copy_(self.memory.spare(state), state)
        self._kept_counts = [layer.counts for layer in self.layers]

    def undo(self) -> None:
        """Take back the step since `keep`, on the device and on the host, however much of it has run."""
        state = self._state()
        torch._foreach_copy_(state, self.memory.spare(state))
        self._set_counts(self._kept_counts)

    def _state(self) -> list[torch.Tensor]:
        return [tensor for layer in self.layers for tensor in layer.state]

    def _set_counts(self, counts: list[Counts]) -> None:
        for layer, count in zip(self.layers, counts, strict=True):
            if count:
                layer.counts = count


def _layer(kind: str, kwargs: Mapping[str, Any], memory: KeptMemory, layer_idx: int, max_tokens: int) -> Any:
    if kind == "full_attention":
        return AnswerLayer(memory, layer_idx, max_tokens)
    if kind == "sliding_attention":
        return AnswerWindow(memory, layer_idx, max_tokens, kwargs["sliding_window"])
    return AnswerNothing() if kind == "dummy" else AnswerState(memory, layer_idx, kwargs["number_of_states"])


class AnswerCaches:
    """Lends one cache at a time in the memory that stays; who comes second gets one that is thrown away."""

    def __init__(self, config: PreTrainedConfig, context_tokens: int) -> None:
        """For texts of up to ``context_tokens``."""
        self._config = config
        self._max_tokens = cache_tokens(context_tokens, context_tokens)
        self._memory = KeptMemory(self._max_tokens)
        self._caches: dict[int, AnswerCache] = {}
        self._lent = threading.Lock()

    @contextmanager
    def lend(self, num_tokens: int) -> Iterator[AnswerCache]:
        """An empty cache for a text that ends within ``num_tokens``."""
        size = cache_tokens(num_tokens, self._max_tokens)
        if not self._lent.acquire(blocking=False):
            yield AnswerCache(self._config, size, KeptMemory(size))
            return
        try:
            cache = self._caches.get(size)
            if cache is None:
                cache = self._caches[size] = AnswerCache(self._config, size, self._memory)
            cache.reset()
            yield cache
        finally:
            self._lent.release()

    def keeps(self, cache: AnswerCache) -> bool:
        """Whether it is one whose memory stays."""
        return any(kept is cache for kept in self._caches.values())


def cache_tokens(num_tokens: int, context_tokens: int) -> int:
    """The size of the cache for a text of ``num_tokens``: few sizes, as every size has recordings of its own."""
    size = SMALLEST_TOKENS
    while size < num_tokens:
        size *= 2
    largest = -(-context_tokens // _ALIGNED_TOKENS) * _ALIGNED_TOKENS
    return min(size, largest)
