"""The clock of one answer, which is its stop switch too."""

import threading
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from transformers import StoppingCriteria


class AnswerClock(StoppingCriteria):  # type: ignore[misc]
    """Called after every token: notes the time and the tokens so far, and stops when it is told to.

    ``watch`` is told after every token how many there are. ``copied``, if it is set, says how many bytes have been
    copied to devices so far: it is asked after every token.
    """

    def __init__(self, watch: Callable[[int], None] | None = None) -> None:
        self.stopped = threading.Event()
        self.begin_s = time.perf_counter()
        self.first_s = self.last_s = self.begin_s
        self.num_tokens = 0
        self.ids = torch.empty(1, 0, dtype=torch.long)
        self.copied: Callable[[], int] | None = None
        self._watch = watch
        self._marks: list[tuple[float, int]] = []

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.last_s = time.perf_counter()
        if self.num_tokens == 0:
            self.first_s = self.last_s
        self.num_tokens += 1
        self.ids = input_ids
        if self.copied is not None:
            self._marks.append((self.last_s, self.copied()))
        done = torch.full((input_ids.shape[0],), self.stopped.is_set(), device=input_ids.device)
        if self._watch is not None:
            self._watch(self.num_tokens)
        return done

    def link_use(self, peak_bytes_per_s: float) -> tuple[float, ...]:
        """Of each decode step, the share of what links of this rate could have carried; empty where that is unknown."""
        if not peak_bytes_per_s:
            return ()
        steps = pairwise(self._marks)
        return tuple(
            (copied - before) / ((end_s - begin_s) * peak_bytes_per_s) for (begin_s, before), (end_s, copied) in steps
        )
