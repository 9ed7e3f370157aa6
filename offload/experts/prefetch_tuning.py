"""``--prefetch auto``: whether lookahead pays is found out from the run itself, and found out again now and then."""

import itertools
import statistics
import time
from typing import Any

from torch import nn

from moe_offload.cache import ExpertCache
from moe_offload.errors import ConfigError
from moe_offload.offload.experts.layer import StepState
from moe_offload.offload.experts.lookahead import Lookahead

AUTO_DEPTH = 2
TRIAL_STEPS = 5
TRIALS = 3
HOLD_STEPS = 400
REQUIRED_GAIN = 0.02
CLEAR_GAIN = 0.15


class _Trials:
    """Decode steps without and with prefetching: how long each took, and how many experts it did not find in a slot.

    Both settings leave the same experts in the slots, so a step's misses are its own and not its setting's. They vary
    from step to step by more than prefetching gains; what a miss costs is taken out before times are compared.
    """

    def __init__(self) -> None:
        self._steps: dict[bool, list[tuple[float, int]]] = {False: [], True: []}

    def add(self, is_on: bool, step_s: float, num_missed: int) -> None:
        """A step was made."""
        self._steps[is_on].append((step_s, num_missed))

    @property
    def nothing_missed(self) -> bool:
        """Whether nothing was asked for without prefetching that it could have brought."""
        return not any(num_missed for _, num_missed in self._steps[False])

    def gain(self) -> float:
        """The share of a step's time that prefetching saves, by medians; negative where it costs."""
        off, on = self._steps[False], self._steps[True]
        slopes = [
            (one_s - other_s) / (one_missed - other_missed)
            for steps in (off, on)
            for (one_s, one_missed), (other_s, other_missed) in itertools.combinations(steps, 2)
            if one_missed != other_missed
        ]
        miss_s = max(0.0, statistics.median(slopes)) if slopes else 0.0
        off_s, on_s = (statistics.median(step_s - miss_s * missed for step_s, missed in steps) for steps in (off, on))
        return (off_s - on_s) / statistics.median(step_s for step_s, _ in off)


class PrefetchTuner:
    """Alternates short trials of decode steps without and with prefetching, then keeps what was faster for a while.

    Prefetching has to be at least 2 % faster; else it stays off. It is not tried at all where nothing is missed, and
    where one setting has turned out to be far faster, the other is tried no longer.
    """

    def __init__(self, depth: int) -> None:
        """``depth``: the layers to look ahead where it is on."""
        self._depth = depth
        self._begin_trials()

    def _begin_trials(self) -> None:
        self._trials = _Trials()
        self._is_on = False
        self._steps_left = TRIAL_STEPS
        self._trials_left = 2 * TRIALS
        self._is_first = True

    @property
    def depth(self) -> int:
        """For the next step."""
        return self._depth if self._is_on else 0

    def record(self, step_s: float, num_missed: int) -> None:
        """A decode step has taken ``step_s`` with the current depth; ``num_missed`` experts were in no slot."""
        if self._trials_left and not self._is_first:
            self._trials.add(self._is_on, step_s, num_missed)
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
        is_pair = self._trials_left % 2 == 0
        if not is_pair and self._trials.nothing_missed:
            self._hold(is_on=False)
        elif is_pair and (not self._trials_left or abs(self._trials.gain()) > CLEAR_GAIN):
            self._hold(is_on=self._trials.gain() > REQUIRED_GAIN)
        else:
            self._is_on = not self._is_on

    def _hold(self, *, is_on: bool) -> None:
        self._trials_left = 0
        self._is_on = is_on
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

    def __init__(
        self, model: nn.Module, step: StepState, lookahead: Lookahead, prefetch: str | int, cache: ExpertCache
    ) -> None:
        self._step, self._lookahead, self._cache = step, lookahead, cache
        self._depth = parse_prefetch(prefetch)
        self._tuner = PrefetchTuner(self._depth) if prefetch == "auto" else None
        self._decode_begin_s: float | None = None
        self._num_missed = 0
        lookahead.reads_prompts_ahead = self._depth > 0
        model.register_forward_pre_hook(self._before)

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        now_s = time.perf_counter()
        if self._tuner is not None and self._decode_begin_s is not None and not self._step.prefill:
            num_missed = self._cache.stats.num_missed("decode")
            self._tuner.record(now_s - self._decode_begin_s, num_missed - self._num_missed)
            self._num_missed = num_missed
        self._decode_begin_s = None if self._step.prefill else now_s
        depth = self._depth if self._tuner is None else self._tuner.depth
        self._lookahead.depth = 0 if self._step.prefill else depth
