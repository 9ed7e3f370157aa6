"""The clock of one answer, which is its stop switch too."""

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import StoppingCriteria


class AnswerClock(StoppingCriteria):  # type: ignore[misc]
    """Called after every token: notes the time and the tokens so far, and stops when it is told to.

    ``watch`` is told after every token how many there are.
    """

    def __init__(self, watch: Callable[[int], None] | None = None) -> None:
        self.stopped = threading.Event()
        self.begin_s = time.perf_counter()
        self.first_s = self.last_s = self.begin_s
        self.num_tokens = 0
        self.ids = torch.empty(1, 0, dtype=torch.long)
        self._watch = watch

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.last_s = time.perf_counter()
        if self.num_tokens == 0:
            self.first_s = self.last_s
        self.num_tokens += 1
        self.ids = input_ids
        done = torch.full((input_ids.shape[0],), self.stopped.is_set(), device=input_ids.device)
        if self._watch is not None:
            self._watch(self.num_tokens)
        return done
