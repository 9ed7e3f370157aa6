"""Experts that other processes hold: what a layer needs of expert parallelism."""

from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Protocol

import torch

Answers = Iterable[tuple[int, torch.Tensor]]
"""Experts and their outputs, as they come in; to iterate is to wait."""


class Call(IntEnum):
    """By which of a layer's calls experts are computed: the bits of the result may depend on it."""

    STEP = 0
    """One token, by the call that takes all its experts: fp32 outputs."""
    ROWS = 1
    """Some rows an expert, by one call of a kernel where that is worth while."""
    EACH = 2
    """Some rows an expert, by its MLP as code."""


class Peers(Protocol):
    """The processes that share out a model's experts; the same experts of every layer to each."""

    def is_here(self, expert_idx: int) -> bool:
        """Whether this process holds the expert."""

    def ask(
        self, layer_idx: int, call: Call, x: torch.Tensor, rows_of: Mapping[int, torch.Tensor], *, prefill: bool
    ) -> Answers:
        """Have experts that are elsewhere computed on their rows of ``x [R, H]``; returns when they have been asked.

        Answers that nobody waits for are dropped.
        """

    def prefetch(self, layer_idx: int, expert_ids: Sequence[int]) -> None:
        """A layer will probably ask for these experts, likeliest first: tell those who hold them."""
