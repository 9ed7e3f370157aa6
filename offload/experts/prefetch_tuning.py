"""``--prefetch``: how many layers a step looks ahead; ``auto`` finds out from the run itself whether that pays."""

from typing import Any

from torch import nn

from moe_offload.errors import ConfigError
from moe_offload.offload.experts.layer import StepState
from moe_offload.offload.experts.lookahead import Lookahead
from moe_offload.offload.experts.step_tuning import StepClock, StepTuner, Turn

AUTO_DEPTH = 2


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
    """Sets the depth of lookahead before every forward pass of a model: fixed, or as a `StepTuner` finds."""

    def __init__(
        self, model: nn.Module, step: StepState, lookahead: Lookahead, prefetch: str | int, clock: StepClock, turn: Turn
    ) -> None:
        self._step, self._lookahead = step, lookahead
        self._depth = parse_prefetch(prefetch)
        self._tuner = StepTuner((0, self._depth), fallback=0, turn=turn) if prefetch == "auto" else None
        if self._tuner is not None:
            clock.tell([self._tuner])
        lookahead.reads_prompts_ahead = self._depth > 0
        model.register_forward_pre_hook(self._before)  # behind the clock's: what it tells is known

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        depth = self._depth if self._tuner is None else self._tuner.setting
        self._lookahead.depth = 0 if self._step.prefill else depth
