"""Keys and values of one answer after the other, in memory that stays where it is.

Layers are transformers' static ones. They differ in where their memory comes from, and in that a step of one token can
be undone: what it wrote is where a second run of the step writes it, once the lengths are counted back.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer, get_layer_types_and_kwargs

SMALLEST_TOKENS = 256
_ALIGNED_TOKENS = 8  # attention kernels want masks whose rows begin at multiples of 16 bytes


class KeptMemory:
    """The keys and values of all layers, enough for the longest text; shorter caches use its beginning."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._tensors: dict[tuple[int, str], torch.Tensor] = {}

    def take(self, place: tuple[int, str], wanted: torch.Tensor, largest_tokens: int) -> torch.Tensor:
        """Zeros in the shape of ``wanted [B, heads, tokens, dim]``, always at the same address."""
        tensor = self._tensors.get(place)
        num_values = wanted.numel() // wanted.shape[2] * largest_tokens
        if tensor is None or tensor.numel() < num_values or tensor.dtype != wanted.dtype:
            tensor = self._tensors[place] = wanted.new_zeros(num_values)
        return tensor[: wanted.numel()].view(wanted.shape).zero_()


class AnswerLayer(StaticLayer):  # type: ignore[misc]
    """Full attention."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, memory: KeptMemory, layer_idx: int, max_cache_len: int) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self._memory, self._layer_idx = memory, layer_idx

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """As transformers', in the memory that stays."""
        super().lazy_initialization(key_states, value_states)
        self.keys = self._memory.take((self._layer_idx, "keys"), self.keys, self._memory.max_tokens)
        self.values = self._memory.take((self._layer_idx, "values"), self.values, self._memory.max_tokens)

    @property
    def phase(self) -> str:
        """Steps of one phase do the same on the device."""
        return "full attention"

    counts = (0, 0)
    """What the host knows of the lengths."""

    def count_step(self) -> None:
        """A step that is replayed adds a token on the device: know it on the host too."""

    def undo_step(self) -> None:
        """Take back the last step, which was one of one token."""
        self.cumulative_length.sub_(1)


class AnswerWindow(StaticSlidingWindowLayer):  # type: ignore[misc]
    """A window of attention. Once it is full, a single token takes the oldest one's place, and nothing moves.

    Keys carry their positions, so a full window may lie in any order as long as all of it is seen, as one token does.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, memory: KeptMemory, layer_idx: int, max_cache_len: int, sliding_window: int) -> None:
        super().__init__(max_cache_len=max_cache_len, sliding_window=sliding_window)
        self._memory, self._layer_idx = memory, layer_idx
        self._largest_tokens = min(sliding_window, memory.max_tokens)
        self._replaced = torch.zeros(1, dtype=torch.int64)  # tokens that have taken another's place
        self._num_replaced = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """As transformers', in the memory that stays."""
        super().lazy_initialization(key_states, value_states)
        self.keys = self._memory.take((self._layer_idx, "keys"), self.keys, self._largest_tokens)
        self.values = self._memory.take((self._layer_idx, "values"), self.values, self._largest_tokens)
        self._replaced = self._replaced.to(self.device)

    @property
    def _is_full(self) -> bool:
        return bool(self.cumulative_length_int >= self.max_cache_len)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As transformers', but for a single token in a full window."""
        if self._is_full and key_states.shape[-2] == 1:
            place = self._replaced % self.max_cache_len
            self._replaced.add_(1)
            self._num_replaced += 1
            self.cumulative_length_int += 1
            self.keys.index_copy_(2, place, key_states)
            self.values.index_copy_(2, place, value_states)
            return self.keys, self.values
        if self._num_replaced:  # transformers' code wants the oldest first
            for tensor in (self.keys, self.values):
                tensor.copy_(tensor.roll(-(self._num_replaced % self.max_cache_len), dims=2))
            self._replaced.zero_()
            self._num_replaced = 0
        updated: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
        return updated

    @property
    def phase(self) -> str:
        """Steps of one phase do the same on the device."""
        return "full window" if self._is_full else "window"

    @property
    def counts(self) -> tuple[int, int]:
        """What the host knows of the lengths."""
        return self.cumulative_length_int, self._num_replaced

    @counts.setter
    def counts(self, counts: tuple[int, int]) -> None:
        self.cumulative_length_int, self._num_replaced = counts

    def count_step(self) -> None:
        """A step that is replayed adds a token on the device: know it on the host too."""
        self._num_replaced += self._is_full
        self.cumulative_length_int += 1

    def undo_step(self) -> None:
        """Take back the last step, which was one of one token."""
        self.cumulative_length_int -= 1
        if self._is_full:
            self._num_replaced -= 1
            self._replaced.sub_(1)
        else:
            self.cumulative_length.sub_(1)

    def reset(self) -> None:
        """Nothing is in it."""
        super().reset()
        self._replaced.zero_()
        self._num_replaced = 0


class AnswerCache(StaticCache):  # type: ignore[misc]
    """The cache of an answer that may reach ``max_tokens``."""

    def __init__(self, config: PreTrainedConfig, max_tokens: int, memory: KeptMemory) -> None:
        """For a config that is `supported`."""
        super().__init__(config=config, max_cache_len=max_tokens)
        kinds = zip(*get_layer_types_and_kwargs(config.get_text_config(decoder=True)), strict=True)
        self.layers = [
            AnswerLayer(memory, layer_idx, max_tokens)
            if kind == "full_attention"
            else AnswerWindow(memory, layer_idx, max_tokens, kwargs["sliding_window"])
            for layer_idx, (kind, kwargs) in enumerate(kinds)
        ]

    @staticmethod
    def supported(config: PreTrainedConfig) -> bool:
        """Whether all of the model's layers attend in full or in a sliding window, and to nothing but their text."""
        if config.is_encoder_decoder:
            return False
        kinds, _ = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        return set(kinds) <= {"full_attention", "sliding_attention"}

    @property
    def phase(self) -> tuple[str, ...]:
        """A step recorded in one phase is good for all of it."""
        return tuple(layer.phase for layer in self.layers)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Around a step whose code runs while the device only records: the host forgets that it has run."""
        counts = [layer.counts for layer in self.layers]
        try:
            yield
        finally:
            for layer, count in zip(self.layers, counts, strict=True):
                layer.counts = count

    def count_step(self) -> None:
        """A step that is replayed adds a token to every layer on the device: know it on the host too."""
        for layer in self.layers:
            layer.count_step()

    def undo_step(self) -> None:
        """Take back the last step, which was one of one token, on the device and on the host."""
        for layer in self.layers:
            layer.undo_step()


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
