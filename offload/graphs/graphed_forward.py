"""A model's forward pass that runs decode steps from recordings of itself."""

import functools
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from transformers import Cache

from moe_offload.offload.experts.interrupts import InterruptShield
from moe_offload.offload.experts.layer import StepState
from moe_offload.offload.experts.step_observer import StepObserver
from moe_offload.offload.graphs.answer_cache import AnswerCache, AnswerCaches
from moe_offload.offload.graphs.captured_step import CapturedStep, Foresight, ResidentExperts
from moe_offload.offload.graphs.no_waits import NoWaits
from moe_offload.offload.graphs.recorder import Recorder, RecordingError, Rehearsal
from moe_offload.offload.graphs.routing_record import RoutingRecord
from moe_offload.offload.graphs.slot_table import ABSENT, SlotTable
from moe_offload.offload.graphs.speculation import Speculation
from moe_offload.offload.graphs.static_inputs import fill, signature, static_copy
from moe_offload.offload.graphs.step_recording import StepRecording
from moe_offload.offload.graphs.uses import PendingUses, UseListener

WARMUP_STEPS = 1  # what is first made in a step, such as a cache's memory, is there afterwards
CHECKED_STEPS = 2  # of each way to run a recording, against the model's own code


class GraphedResidency(ResidentExperts, UseListener, Protocol):
    """What steps ask of residency, and tell it."""

    @property
    def miss_path(self) -> object:
        """None where misses are computed as hits are, to the bit."""

    @property
    def observer(self) -> StepObserver | None:
        """Who wants to know what steps do, layer by layer."""


class StepLookahead(Foresight, Protocol):
    """What predicts; see `experts.lookahead`."""

    depth: int
    """How many layers this thread's pass looks ahead."""

    def ask(self, layer_idx: int, *, here_only: bool) -> Iterable[tuple[int, torch.Tensor]]: ...
    def foresaw_misses(self) -> bool: ...


class Clock(Protocol):
    """What times steps; see `experts.step_tuning`."""

    def pass_over(self) -> None: ...


class _Recorded:
    """One kind of step: how often it was seen, and its recording."""

    def __init__(self) -> None:
        self.warmups_left = WARMUP_STEPS
        self.checks_left = {"whole": CHECKED_STEPS, "by layers": CHECKED_STEPS}
        self.inputs: dict[str, Any] = {}
        self.step: CapturedStep | None = None


class GraphedForward:
    """Stands in a model's ``forward``. Steps of one token in an `AnswerCache` run from recordings; all else as ever.

    What comes back is the same to the bit. A recording's first runs are compared with the model's own code; one that
    differs, or code that cannot be recorded, turns recordings off for good, with a warning.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        step: StepState,
        residency: GraphedResidency,
        table: SlotTable,
        recorder: Recorder,
        record: RoutingRecord,
        caches: AnswerCaches,
        lookahead: StepLookahead,
        clock: Clock,
    ) -> None:
        """``step``, ``lookahead`` and ``clock``: the model's."""
        self.is_off = False
        self.num_recorded = self.num_whole = self.num_by_layers = self.num_undone = 0
        self._eager: Any = model.forward
        self._state, self._residency, self._table = step, residency, table
        self._recorder, self._record, self._caches = recorder, record, caches
        self._lookahead, self._clock = lookahead, clock
        self._uses = PendingUses(residency)
        self._speculation = Speculation()
        self._steps: dict[Any, _Recorded] = {}
        functools.update_wrapper(self, self._eager)  # whoever asks for the signature gets the model's
        model.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's forward."""
        self._uses.tell()
        cache = kwargs.get("past_key_values")
        described = None if args or self.is_off else self._described(cache, kwargs)
        if described is None or not isinstance(cache, AnswerCache):
            return self._eager(*args, **kwargs)
        is_tried_whole = self._speculation.is_on and self._residency.observer is None
        if is_tried_whole:  # nothing is missed, so there is nothing to foresee
            self._lookahead.depth = 0
        recorded = self._steps.setdefault((described, self._lookahead.depth), _Recorded())
        if recorded.warmups_left:
            recorded.warmups_left -= 1
            self._clock.pass_over()
            return self._eager(**kwargs)
        if recorded.step is None:
            self._clock.pass_over()
            try:
                with InterruptShield():
                    self._make(recorded, cache, kwargs)
            except RecordingError as error:
                self._turn_off(
                    f"decode steps of this model cannot be recorded ({error}), so they run without CUDA graphs"
                )
                return self._eager(**kwargs)
        assert recorded.step is not None
        return self._run(recorded, recorded.step, cache, kwargs, is_tried_whole)

    def forget(self) -> None:
        """Slots have moved: recordings read where they were."""
        self._steps.clear()

    def tell_uses(self) -> None:
        """Let the cache's counts be whole: the last step's uses may be untold."""
        self._uses.tell()

    def _described(self, cache: Any, kwargs: Mapping[str, Any]) -> Any:
        """What a recording must have in common with this step; None for what is not recorded."""
        tokens = kwargs.get("input_ids")
        if not isinstance(cache, AnswerCache) or tokens is None or tokens.shape != (1, 1):
            return None
        described = signature(kwargs) if self._caches.keeps(cache) else None
        return None if described is None else (described, cache.phase)

    def _make(self, recorded: _Recorded, cache: AnswerCache, kwargs: Mapping[str, Any]) -> None:
        """Run the model's code twice: as a rehearsal, which is undone, and while the device only records."""
        inputs = recorded.inputs = static_copy(kwargs)
        cache.keep()
        try:
            self._rehearse(inputs)
        finally:
            cache.undo()
        recording = StepRecording(self._recorder, self._record, self._table.device, self._lookahead.ask)
        with self._recorder.session(), cache.recorded(), self._state.recorded_by(recording):
            self._recorder.begin()
            output = self._eager(**inputs)
            last = self._recorder.end()
        if not all(isinstance(value, torch.Tensor | Cache) for value in output.values()):
            raise RecordingError(f"its {type(output).__name__} holds more than tensors")
        recorded.step = CapturedStep(recording, last, self._record, output)
        self.num_recorded += 1

    def _rehearse(self, inputs: Mapping[str, Any]) -> None:
        """On this thread's stream, from memory that steps use anyway; with experts that are in no slot."""
        nowhere = torch.full_like(self._table.device, ABSENT)
        rehearsal = StepRecording(Rehearsal(), self._record, nowhere, self._lookahead.ask)
        try:
            with NoWaits(), self._state.recorded_by(rehearsal):  # type: ignore[no-untyped-call]
                self._eager(**inputs)
        except RuntimeError as error:
            raise RecordingError(str(error).splitlines()[0]) from error

    def _run(
        self,
        recorded: _Recorded,
        step: CapturedStep,
        cache: AnswerCache,
        kwargs: Mapping[str, Any],
        is_tried_whole: bool,
    ) -> Any:
        self._state.check_stopped()
        fill(recorded.inputs, kwargs)
        is_whole = is_tried_whole and step.can_run_whole
        checks, copies_misses = recorded.checks_left, self._residency.miss_path is None
        # Whether a second run may differ in the last bits is known when the first is over, and has been observed.
        may_check = copies_misses or self._residency.observer is None
        if is_whole or checks["by layers"]:
            cache.keep()
        way, missed = self._replay(step, cache, is_whole, is_checked=may_check and bool(checks["by layers"]))
        if not checks[way] or not may_check or (missed and not copies_misses):
            return _copied(step.output)
        checks[way] -= 1
        self._clock.pass_over()
        logits = step.output.logits.clone()
        cache.undo()
        self._lookahead.depth = 0  # all was foreseen in the first run
        output = self._eager(**kwargs)
        if not torch.equal(logits, output.logits):
            self._turn_off(
                f"a decode step replayed {way} gave other logits than the same step run as it is, so steps are no "
                "longer replayed; please report this with the model, the GPU and the versions of torch and transformers"
            )
        return output

    def _replay(self, step: CapturedStep, cache: AnswerCache, is_whole: bool, *, is_checked: bool) -> tuple[str, bool]:
        """Run the step in one of the two ways; which, and whether it missed an expert."""
        if is_whole:
            cache.count_step()
            if step.run_whole(self._table, self._uses):
                self._speculation.record(missed=False)
                self.num_whole += 1
                return "whole", False
            self._speculation.record(missed=True)
            self.num_undone += 1
            cache.undo()
        # Of a step that is checked, what an observer sees is the second run, in which all is as ever.
        observer = None if is_checked else self._residency.observer
        cache.count_step()
        missed = step.run_by_layers(self._residency, self._lookahead, observer)
        if not is_whole:
            self._speculation.record(missed or self._lookahead.foresaw_misses())
        self.num_by_layers += 1
        return "by layers", missed

    def _turn_off(self, why: str) -> None:
        self.is_off = True
        self._steps.clear()
        warnings.warn(why, UserWarning, stacklevel=2)


def _copied(output: Any) -> Any:
    """The same output with tensors that the next step does not overwrite."""
    values = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in output.items()}
    return type(output)(**values)
