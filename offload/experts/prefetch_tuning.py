"""``--prefetch auto``: whether lookahead pays is found out from the run itself, and found out again now and then."""

import statistics
import time
from typing import Any

from torch import nn

from moe_offload.errors import ConfigError
from moe_offload.offload.experts.layer import StepState
from moe_offload.offload.experts.lookahead import Lookahead

AUTO_DEPTH = 1
TRIAL_STEPS = 6
TRIALS = 3
HOLD_STEPS = 400
REQUIRED_GAIN = 0.02


class PrefetchTuner:
    """Alternates short trials of decode steps without and with prefetching, then keeps what was faster for a while.

    Prefetching has to be at least 2 % faster by the medians of the steps' times; else it stays off.
    """

    def __init__(self, depth: int) -> None:
        """``depth``: the layers to look ahead where it is on."""
        self._depth = depth
        self._begin_trials()

    def _begin_trials(self) -> None:
        self._times_s: dict[bool, list[float]] = {False: [], True: []}
        self._is_on = False
        self._steps_left = TRIAL_STEPS
        self._trials_left = 2 * TRIALS
        self._is_first = True

    @property
    def depth(self) -> int:
        """For the next step."""
        return self._depth if self._is_on else 0

    def record(self, step_s: float) -> None:
        """A decode step has taken ``step_s`` with the current depth."""
        if self._trials_left and not self._is_first:
            self._times_s[self._is_on].append(step_s)
        self._is_first = False  # the first step after a switch still lives on what the other setting brought
        self._steps_left -= 1
        if self._steps_left > 0:
            return
        if self._trials_left == 0:
            self._begin_trials()
            return
        self._trials_left -= 1
        self._is_first = True
        self._steps_left = TRIAL_STEPS
        if self._trials_left:
            self._is_on = not self._is_on
            return
        off_s, on_s = statistics.median(self._times_s[False]), statistics.median(self._times_s[True])
        self._is_on = on_s < off_s * (1 - REQUIRED_GAIN)
        self._steps_left = HOLD_STEPS


def parse_prefetch(prefetch: str | int) -> int:
    """The most layers that "off", "auto" or a number looks ahead; `ConfigError` for anything else."""
    if prefetch == "off":
        return 0
    if prefetch == "auto":
        return AUTO_DEPTH
    if isinstance(prefetch, int) and not isinstance(prefetch, bool) and prefetch >= 0:
        return prefetch
    raise ConfigError(f"prefetch is {prefetch!r}; use off, auto or a number of layers")


class PrefetchSwitch:
    """Sets the depth of lookahead before every forward pass of a model: fixed, or as a `PrefetchTuner` finds."""

    def __init__(self, model: nn.Module, step: StepState, lookahead: Lookahead, prefetch: str | int) -> None:
        self._step, self._lookahead = step, lookahead
        self._depth = parse_prefetch(prefetch)
        self._tuner = PrefetchTuner(self._depth) if prefetch == "auto" else None
        self._decode_begin_s: float | None = None
        lookahead.reads_prompts_ahead = self._depth > 0
        model.register_forward_pre_hook(self._before)

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        now_s = time.perf_counter()
        if self._tuner is not None and self._decode_begin_s is not None and not self._step.prefill:
            self._tuner.record(now_s - self._decode_begin_s)
        self._decode_begin_s = None if self._step.prefill else now_s
        depth = self._depth if self._tuner is None else self._tuner.depth
        self._lookahead.depth = 0 if self._step.prefill else depth
