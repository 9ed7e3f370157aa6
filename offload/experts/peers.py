"""Experts that other processes hold: what a layer needs of expert parallelism."""

from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Protocol

import torch

from moe_offload.offload.reports import RunReport

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

    @property
    def num_missed(self) -> int:
        """Experts that decode steps asked of others, and that were in no slot there."""

    @property
    def wait_s(self) -> float:
        """Time spent waiting for others."""

    @property
    def num_bytes(self) -> int:
        """Bytes sent and received."""

    def reports(self) -> Sequence[RunReport]:
        """What each of the others has counted so far."""

    def is_here(self, expert_idx: int) -> bool:
        """Whether this process holds the expert."""

    def ask(
        self, layer_idx: int, call: Call, x: torch.Tensor, rows_of: Mapping[int, torch.Tensor], *, prefill: bool
    ) -> Answers:
        """Have experts that are elsewhere computed on their rows of ``x [R, H]``; returns when they have been asked.

        Answers that nobody waits for are dropped.
        """

    def new_sequence(self) -> None:
        """Another text begins."""

    def prefetch(self, layer_idx: int, expert_ids: Sequence[int]) -> None:
        """A layer will probably ask for these experts, likeliest first: tell those who hold them."""
