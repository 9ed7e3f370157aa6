"""Who is told what the layers of a forward pass do, if anybody is: each call is made by the thread of the pass."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from moe_offload.offload.reports import RunReport


class StepObserver(Protocol):
    """To be quick, not to raise, and not to change anything."""

    def begin_layer(self, layer_idx: int, top_k_index: torch.Tensor | None, top_k_weights: torch.Tensor | None) -> None:
        """A layer's router has chosen: index and weights ``[T, K]``; None where a family does not say it by tokens."""

    def end_layer(self) -> None:
        """The layer's experts are computed."""

    def guessed(self, layer_idx: int, expert_idx: int, arrived: bool) -> None:
        """An expert that the cache called missing was prefetched into staging, and its bytes have arrived, or not."""

    def waited(self, duration_ns: int) -> None:
        """Nothing was computed for so long, because an expert was awaited."""

    def look_ahead(self, issued: Callable[[], None]) -> None:
        """Call ``issued``, which asks later layers' routers."""

    def predicted(self, layer_idx: int, target_idx: int, expert_ids: Sequence[int], top_k_index: torch.Tensor) -> None:
        """At ``layer_idx``, these experts were predicted for ``target_idx``; index ``[T, K]``, best first."""

    def end_answer(self, report: RunReport) -> None:
        """The answer that this thread was at has ended; `CacheObserver` was told when it began."""
