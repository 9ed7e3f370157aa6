"""The layers of an answer's cache, in memory that stays where it is.

They are transformers' static ones. They differ in where their memory comes from, and in that a step of one token can be
undone: lengths and states are kept before it and put back, and the keys it wrote are where a second run writes them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DummyLayer, LinearAttentionLayer, StaticLayer, StaticSlidingWindowLayer

Counts = tuple[int, ...]
"""What the host knows of the lengths in a layer."""


class KeptMemory:
    """The keys, values and states of all layers, enough for the longest text; shorter caches use its beginning."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._tensors: dict[tuple[int, str], torch.Tensor] = {}
        self._spare: list[torch.Tensor] = []

    def take(self, place: tuple[int, str], wanted: torch.Tensor, largest_tokens: int) -> torch.Tensor:
        """Zeros in the shape of ``wanted [B, heads, tokens, dim]``, always at the same address."""
        return self._take(place, wanted, wanted.numel() // wanted.shape[2] * largest_tokens)

    def take_state(self, place: tuple[int, str], wanted: torch.Tensor) -> torch.Tensor:
        """Zeros in the shape of ``wanted``, always at the same address."""
        return self._take(place, wanted, wanted.numel())

    def spare(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Tensors like these, which every cache of these shapes may write to."""
        if [tensor.shape for tensor in self._spare] != [tensor.shape for tensor in tensors]:
            self._spare = [torch.empty_like(tensor) for tensor in tensors]
        return self._spare

    def _take(self, place: tuple[int, str], wanted: torch.Tensor, num_values: int) -> torch.Tensor:
        tensor = self._tensors.get(place)
        if tensor is None or tensor.numel() < num_values or tensor.dtype != wanted.dtype:
            tensor = self._tensors[place] = wanted.new_zeros(num_values)
        return tensor[: wanted.numel()].view(wanted.shape).zero_()


class AnswerLayer(StaticLayer):  # type: ignore[misc]
    """Full attention."""

    keys: torch.Tensor
    values: torch.Tensor
    phase = "full attention"
    """Steps of one phase do the same on the device."""
    counts: Counts = ()

    def __init__(self, memory: KeptMemory, layer_idx: int, max_cache_len: int) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self._memory, self._layer_idx = memory, layer_idx

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """As transformers', in the memory that stays."""
        super().lazy_initialization(key_states, value_states)
        self.keys = self._memory.take((self._layer_idx, "keys"), self.keys, self._memory.max_tokens)
        self.values = self._memory.take((self._layer_idx, "values"), self.values, self._memory.max_tokens)

    @property
    def state(self) -> Sequence[torch.Tensor]:
        """What a step changes on the device and a second run of it does not overwrite."""
        return [self.cumulative_length]

    def count_step(self) -> None:
        """A step that is replayed adds a token on the device: know it on the host too."""


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
    def counts(self) -> Counts:
        """What the host knows of the lengths."""
        return self.cumulative_length_int, self._num_replaced

    @counts.setter
    def counts(self, counts: Counts) -> None:
        self.cumulative_length_int, self._num_replaced = counts

    @property
    def state(self) -> Sequence[torch.Tensor]:
        """What a step changes on the device and a second run of it does not overwrite."""
        return [self.cumulative_length, self._replaced]

    def count_step(self) -> None:
        """A step that is replayed adds a token on the device: know it on the host too."""
        self._num_replaced += self._is_full
        self.cumulative_length_int += 1

    def reset(self) -> None:
        """Nothing is in it."""
        super().reset()
        self._replaced.zero_()
        self._num_replaced = 0


class AnswerState(LinearAttentionLayer):  # type: ignore[misc]
    """A state of one size whatever the length, which every token changes: delta nets, Mamba, convolutions."""

    phase = "state"
    """Steps of one phase do the same on the device."""
    counts: Counts = ()

    def __init__(self, memory: KeptMemory, layer_idx: int, number_of_states: int) -> None:
        super().__init__(number_of_states=number_of_states)
        self._memory, self._layer_idx = memory, layer_idx

    def lazy_initialization(
        self,
        conv_states: torch.Tensor | None = None,
        recurrent_states: torch.Tensor | None = None,
        state_idx: int = 0,
        **kwargs: Any,
    ) -> None:
        """As transformers', in the memory that stays."""
        super().lazy_initialization(conv_states, recurrent_states, state_idx, **kwargs)
        for name, given, states in (
            ("convolution", conv_states, self.conv_states),
            ("recurrent", recurrent_states, self.recurrent_states),
        ):
            if given is not None:
                place = (self._layer_idx, f"{name} state {state_idx}")
                states[state_idx] = self._memory.take_state(place, states[state_idx])

    @property
    def state(self) -> Sequence[torch.Tensor]:
        """What a step changes on the device and a second run of it does not overwrite."""
        states = [*self.conv_states.values(), *self.recurrent_states.values()]
        return [tensor for tensor in states if tensor is not None]

    def count_step(self) -> None:
        """A step that is replayed changes nothing that the host knows."""


class AnswerNothing(DummyLayer):  # type: ignore[misc]
    """Of a layer that keeps nothing."""

    phase = "nothing"
    """Steps of one phase do the same on the device."""
    counts: Counts = ()
    state: Sequence[torch.Tensor] = ()

    def count_step(self) -> None:
        """Nothing is counted."""
