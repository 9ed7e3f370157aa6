"""A model's forward pass that runs decode steps from recordings of itself."""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from transformers import Cache

from moe_offload.offload.experts.layer import StepState
from moe_offload.offload.graphs.answer_cache import AnswerCache, AnswerCaches
from moe_offload.offload.graphs.captured_step import CapturedStep, ResidentExperts
from moe_offload.offload.graphs.recorder import Recorder, RecordingError
from moe_offload.offload.graphs.routing_record import RoutingRecord
from moe_offload.offload.graphs.slot_table import SlotTable
from moe_offload.offload.graphs.speculation import Speculation
from moe_offload.offload.graphs.static_inputs import fill, signature, static_copy
from moe_offload.offload.graphs.step_recording import StepRecording
from moe_offload.offload.graphs.uses import PendingUses, UseListener

WARMUP_STEPS = 2  # libraries choose algorithms and compile kernels at first use, which cannot be recorded
CHECKED_STEPS = 2  # of each way to run a recording, against the model's own code


class GraphedResidency(ResidentExperts, UseListener, Protocol):
    """What steps ask of residency, and tell it."""

    @property
    def miss_path(self) -> object:
        """None where misses are computed as hits are, to the bit."""


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
        *,
        is_plain: Callable[[], bool],
    ) -> None:
        """``is_plain``: nobody wants to see, or foresee, what this thread's next step does layer by layer."""
        self.is_off = False
        self.num_recorded = self.num_whole = self.num_by_layers = self.num_undone = 0
        self._eager: Any = model.forward
        self._state, self._residency, self._table = step, residency, table
        self._recorder, self._record, self._caches = recorder, record, caches
        self._is_plain = is_plain
        self._uses = PendingUses(residency)
        self._speculation = Speculation()
        self._steps: dict[Any, _Recorded] = {}
        functools.update_wrapper(self, self._eager)  # whoever asks for the signature gets the model's
        model.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's forward."""
        self._uses.tell()
        cache = kwargs.get("past_key_values")
        key = None if args or self.is_off or not self._is_plain() else self._key(cache, kwargs)
        if key is None or not isinstance(cache, AnswerCache):
            return self._eager(*args, **kwargs)
        recorded = self._steps.setdefault(key, _Recorded())
        if recorded.warmups_left:
            recorded.warmups_left -= 1
            return self._eager(**kwargs)
        try:
            if recorded.step is None:
                self._make(recorded, cache, kwargs)
        except RecordingError as error:
            self._turn_off(f"decode steps of this model cannot be recorded ({error}), so they run without CUDA graphs")
            return self._eager(**kwargs)
        return self._run(recorded, cache, kwargs)

    def forget(self) -> None:
        """Slots have moved: recordings read where they were."""
        self._steps.clear()

    def tell_uses(self) -> None:
        """Let the cache's counts be whole: the last step's uses may be untold."""
        self._uses.tell()

    def _key(self, cache: Any, kwargs: Mapping[str, Any]) -> Any:
        """What a recording must have in common with this step; None for what is not recorded."""
        tokens = kwargs.get("input_ids")
        if not isinstance(cache, AnswerCache) or tokens is None or tokens.shape != (1, 1):
            return None
        described = signature(kwargs) if self._caches.keeps(cache) else None
        return None if described is None else (described, cache.phase)

    def _make(self, recorded: _Recorded, cache: AnswerCache, kwargs: Mapping[str, Any]) -> None:
        """Run the model's code once, while the device records and computes nothing."""
        recorded.inputs = static_copy(kwargs)
        recording = StepRecording(self._recorder, self._record, self._table.device)
        with self._recorder.session(), cache.recorded(), self._state.recorded_by(recording):
            self._recorder.begin()
            output = self._eager(**recorded.inputs)
            last = self._recorder.end()
        if not all(isinstance(value, torch.Tensor | Cache) for value in output.values()):
            raise RecordingError(f"its {type(output).__name__} holds more than tensors")
        recorded.step = CapturedStep(recording, last, self._record, output)
        self.num_recorded += 1

    def _run(self, recorded: _Recorded, cache: AnswerCache, kwargs: Mapping[str, Any]) -> Any:
        self._state.check_stopped()
        step = recorded.step
        assert step is not None, "it was made"
        fill(recorded.inputs, kwargs)
        way, missed = self._replay(step, cache)
        is_exact = not missed or self._residency.miss_path is None  # else a second run may differ in the last bits
        if not recorded.checks_left[way] or not is_exact:
            return _copied(step.output)
        recorded.checks_left[way] -= 1
        logits = step.output.logits.clone()
        cache.undo_step()
        output = self._eager(**kwargs)
        if not torch.equal(logits, output.logits):
            self._turn_off(
                f"a decode step replayed {way} gave other logits than the same step run as it is, so steps are no "
                "longer replayed; please report this with the model, the GPU and the versions of torch and transformers"
            )
        return output

    def _replay(self, step: CapturedStep, cache: AnswerCache) -> tuple[str, bool]:
        """Run the step in one of the two ways; which, and whether it missed an expert."""
        if step.can_run_whole and self._speculation.is_on:
            cache.count_step()
            if step.run_whole(self._table, self._uses):
                self._speculation.record(missed=False)
                self.num_whole += 1
                return "whole", False
            self._speculation.record(missed=True)
            self.num_undone += 1
            cache.undo_step()
            cache.count_step()
            missed = step.run_by_layers(self._residency)
        else:
            cache.count_step()
            missed = step.run_by_layers(self._residency)
            self._speculation.record(missed)
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
