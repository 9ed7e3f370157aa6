"""Settings of which nobody can foretell the fastest: tried on steps of the run itself, and again now and then."""

import itertools
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

from torch import nn

# A first look at each of several settings, which only has to find what is far slower: a short run is over soon.
FIRST_STEPS = 4
TRIAL_STEPS = 5
TRIALS = 3
# What is ahead after the first trials gets so many steps of each further round: finding out costs a fifth of the steps.
LEADING_STEPS = 20
HOLD_STEPS = 400
LONGEST_HOLD_STEPS = 1600
REQUIRED_GAIN = 0.02
CLEAR_GAIN = 0.15
# A step on trial is cut short when it has taken so many times the second longest of the best setting so far.
LATE = 2.0
# What is held is tried again when steps have become so many times longer, or shorter, than when it was chosen.
DRIFT = 1.25
DRIFT_STEPS = 32
# Steps without a miss after which there is nothing to try, and with one each after which there is again.
CALM_STEPS = 3
Setting = TypeVar("Setting")
_Step = tuple[float, int]  # how long it took, and how many experts it did not find in a slot


class Turn:
    """Only one of several tuners tries at a time: what two change at once could not be told apart."""

    def __init__(self) -> None:
        self._taken_by: object | None = None

    def take(self, who: object) -> bool:
        """Whether nobody else has it."""
        if self._taken_by is None:
            self._taken_by = who
        return self._taken_by is who

    def give_back(self) -> None:
        """The next may take it."""
        self._taken_by = None

    @property
    def is_free(self) -> bool:
        """Whether nobody tries anything."""
        return self._taken_by is None


class _Trials:
    """Decode steps with each setting of those that are still worth trying.

    The experts that a step misses are taken for its own, and not for its setting's: they vary from step to step by more
    than settings differ in time. What a miss costs is taken out before times are compared.
    """

    def __init__(self, num_settings: int) -> None:
        self.steps: list[list[_Step]] = [[] for _ in range(num_settings)]
        self.worth_trying = list(range(num_settings))

    def typical_s(self) -> dict[int, float]:
        """A step's time less what its misses cost, by the median, of every setting that was tried."""
        slopes = [
            (one_s - other_s) / (one_missed - other_missed)
            for steps in self.steps
            for (one_s, one_missed), (other_s, other_missed) in itertools.combinations(steps, 2)
            if one_missed != other_missed
        ]
        miss_s = max(0.0, statistics.median(slopes)) if slopes else 0.0
        return {
            index: statistics.median(step_s - miss_s * missed for step_s, missed in steps)
            for index, steps in enumerate(self.steps)
            if steps and index in self.worth_trying
        }

    def losses(self) -> dict[int, float]:
        """By how much of a step's time each is slower than the fastest."""
        typical_s = self.typical_s()
        if not typical_s:
            return {}
        best = min(typical_s, key=typical_s.__getitem__)
        step_s = statistics.median(step_s for step_s, _ in self.steps[best])
        return {index: (its_s - typical_s[best]) / step_s for index, its_s in typical_s.items()}

    def limit_s(self, index: int) -> float | None:
        """What a step with this setting may take before that alone tells that another is better."""
        typical_s = self.typical_s()
        typical_s.pop(index, None)
        if not typical_s:
            return None
        times_s = sorted(step_s for step_s, _ in self.steps[min(typical_s, key=typical_s.__getitem__)])
        return LATE * times_s[-2:][0]  # the longest may be a hiccup


class StepTuner(Generic[Setting]):
    """Alternates short trials of decode steps with each of several settings, then keeps the fastest for a while.

    Whatever is not at least 2 % faster than the setting to fall back on gives way to that. Nothing is tried where no
    expert is missed: the fallback is kept until steps miss some again. What turns out to be far slower is tried no
    longer.
    """

    def __init__(self, settings: Sequence[Setting], *, fallback: Setting, turn: Turn | None = None) -> None:
        """``settings``: in the order of trials. ``turn``: shared with the other tuners of the same steps."""
        self._settings, self._fallback = settings, settings.index(fallback)
        self._turn = Turn() if turn is None else turn
        self._held: int | None = None
        self._hold_steps = HOLD_STEPS
        self._trials: _Trials | None = None
        self._waiting: list[int] = []
        self._leading: int | None = None
        self._current = self._fallback
        self._steps_left = self._rounds_left = 0
        self._limit_s: float | None = None
        self._is_first = self._is_cut_short = False
        self._since_held: list[float] = []
        self._recent_missed: deque[int] = deque(maxlen=CALM_STEPS)  # of the last steps with the fallback
        self._is_calm = False
        self._expected_s: float | None = None
        self._lock = threading.Lock()
        self._begin_trials()

    @property
    def setting(self) -> Setting:
        """For the next step."""
        return self._settings[self._current]

    @property
    def is_trying(self) -> bool:
        """Whether steps are being compared just now."""
        return self._trials is not None

    def setting_after(self, elapsed_s: float) -> Setting:
        """For the rest of a step that has taken so long already: one on trial may turn out to be hopeless."""
        if self._limit_s is not None and elapsed_s > self._limit_s:
            with self._lock:
                self._cut_short()
        return self.setting

    def record(self, step_s: float, num_missed: int) -> None:
        """A decode step has taken ``step_s`` with the current setting; ``num_missed`` experts were in no slot."""
        with self._lock:
            if self._current == self._fallback and not self._is_first:
                self._recent_missed.append(num_missed)
            if self._trials is None:
                self._hold_on(step_s)
            else:
                self._record_trial(self._trials, step_s, num_missed)

    # -- trials; the lock is held --

    def _record_trial(self, trials: _Trials, step_s: float, num_missed: int) -> None:
        if not self._is_first and not self._is_cut_short:
            trials.steps[self._current].append((step_s, num_missed))
        self._is_first = False  # the first step after a switch still lives on what the other setting brought
        self._steps_left -= 1
        if self._steps_left <= 0 or self._is_cut_short:
            self._end_trial(trials)

    def _cut_short(self) -> None:
        if self._limit_s is None or self._trials is None:  # another thread's step was first
            return
        self._trials.worth_trying.remove(self._current)
        losses = self._trials.losses()
        self._current, self._limit_s, self._is_cut_short = min(losses, key=losses.__getitem__), None, True

    def _begin_trials(self) -> None:
        if not self._turn.take(self):
            return
        self._is_calm = False
        self._recent_missed.clear()
        self._trials = _Trials(len(self._settings))
        # First what was best so far: against it the others are soon found to be hopeless.
        self._waiting = sorted(self._trials.worth_trying, key=lambda index: index != self._held)
        self._rounds_left, self._leading = TRIALS, None
        self._begin_trial(self._trials)

    def _begin_trial(self, trials: _Trials) -> None:
        self._current = self._waiting.pop(0)
        if self._leading is None and len(self._settings) > 2:
            self._steps_left = FIRST_STEPS
        else:
            self._steps_left = LEADING_STEPS if self._current == self._leading else TRIAL_STEPS
        self._is_first, self._is_cut_short = True, False
        self._limit_s = trials.limit_s(self._current)

    def _end_trial(self, trials: _Trials) -> None:
        if len(self._recent_missed) == CALM_STEPS and not any(self._recent_missed):
            # What other settings were tried for is over: a cache has filled, or a text needs what is there.
            self._hold(self._fallback)
            self._is_calm = True
            return
        if self._waiting:
            self._begin_trial(trials)
            return
        self._rounds_left -= 1
        losses = trials.losses()
        trials.worth_trying = [index for index in losses if losses[index] <= CLEAR_GAIN]
        if self._rounds_left and len(trials.worth_trying) > 1:
            self._waiting = sorted(trials.worth_trying, key=losses.__getitem__)
            self._leading = self._waiting[0]
            self._begin_trial(trials)
        else:
            falls_back = losses.get(self._fallback, 1.0) <= REQUIRED_GAIN
            self._hold(self._fallback if falls_back else min(losses, key=losses.__getitem__))

    # -- what was found; the lock is held --

    def _hold(self, index: int) -> None:
        is_confirmed = index == self._held
        self._hold_steps = min(2 * self._hold_steps, LONGEST_HOLD_STEPS) if is_confirmed else HOLD_STEPS
        self._steps_left = self._hold_steps
        self._held = self._current = index
        self._trials, self._limit_s, self._expected_s = None, None, None
        self._since_held = []
        self._turn.give_back()

    def _hold_on(self, step_s: float) -> None:
        if self._is_calm:
            if len(self._recent_missed) == CALM_STEPS and all(self._recent_missed):
                self._begin_trials()
            return
        self._steps_left -= 1
        if self._turn.is_free:  # else these steps are somebody else's trials
            self._since_held.append(step_s)
        if self._steps_left <= 0 or (self._has_drifted() and self._steps_left <= self._hold_steps - HOLD_STEPS // 2):
            self._begin_trials()

    def _has_drifted(self) -> bool:
        if len(self._since_held) < DRIFT_STEPS:
            return False
        now_s = statistics.median(self._since_held)
        self._since_held = []
        if self._expected_s is None:
            self._expected_s = now_s
        return not self._expected_s / DRIFT <= now_s <= self._expected_s * DRIFT


class StepClock:
    """Times the decode steps of a model for its tuners."""

    def __init__(self, model: nn.Module, is_prefill: Callable[[], bool], count_missed: Callable[[], int]) -> None:
        """``is_prefill``: whether this thread's pass is a prompt; ``count_missed``: of decode steps, since loading."""
        self._is_prefill, self._count_missed = is_prefill, count_missed
        self._record: list[Callable[[float, int], None]] = []
        self._begin_s: float | None = None
        self._num_missed = 0
        self._is_odd = False
        model.register_forward_pre_hook(self._before)

    def tell(self, tuners: Iterable[StepTuner[Any]]) -> None:
        """Let these know of every step from now on."""
        self._record += [tuner.record for tuner in tuners]

    def pass_over(self) -> None:
        """The step under way does what others do not, such as being recorded: its time tells nothing of them."""
        self._is_odd = True

    @property
    def elapsed_s(self) -> float:
        """Of the decode step under way; 0 in a prompt, and in a step that is passed over."""
        return 0.0 if self._begin_s is None or self._is_odd else time.perf_counter() - self._begin_s

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        now_s = time.perf_counter()
        if self._record and self._begin_s is not None and not self._is_prefill():
            num_missed = self._count_missed()
            for record in () if self._is_odd else self._record:
                record(now_s - self._begin_s, num_missed - self._num_missed)
            self._num_missed = num_missed
        self._is_odd = False
        self._begin_s = None if self._is_prefill() else now_s
