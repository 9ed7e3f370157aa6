"""``--miss-path``: where experts that are not in VRAM are computed: on the GPU after a copy, on the CPU, or on both."""

import statistics
import threading
from collections import deque

import torch

from moe_offload.errors import ConfigError
from moe_offload.offload.experts.host_step import HostStep
from moe_offload.offload.experts.pair_outputs import ExpertFn
from moe_offload.offload.experts.step_tuning import StepClock, StepTuner, Turn
from moe_offload.offload.experts.weights import MlpParts
from moe_offload.offload.tiers.lender import Lender

COPY, CPU, SPLIT, AUTO = "copy", "cpu", "split", "auto"
MISS_PATHS = (AUTO, COPY, CPU, SPLIT)
# What ``auto`` tries, in this order: first what adapts itself, against which the hopeless is soon cut short.
AUTO_ORDER = (SPLIT, COPY, CPU)
_RECENT = 5
# What was not measured for a while counts for less and less, until it is tried again: half in 350 layers.
_FADE = 0.998


def check_miss_path(miss_path: str, device: str) -> None:
    """`ConfigError` if there is no such path, or nothing to choose on this device ("cpu" or "cuda")."""
    if miss_path not in MISS_PATHS:
        raise ConfigError(f"miss_path is {miss_path!r}; use {', '.join(MISS_PATHS)}")
    if device == "cpu" and miss_path in (CPU, SPLIT):
        raise ConfigError(
            f"--miss-path {miss_path} is for a GPU, whose misses the CPU can compute; with --device cpu it computes "
            "everything anyway: leave the option out"
        )


class _CpuRate:
    """What a byte of experts takes on the CPU, by the median of the last few calls; 0 before the first."""

    def __init__(self) -> None:
        self.s_per_byte = 0.0
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def add(self, seconds: float, num_bytes: int) -> None:
        self._recent.append(seconds / num_bytes)
        self.s_per_byte = statistics.median(self._recent)

    def fade(self) -> None:
        self.s_per_byte *= _FADE


class MissPath:
    """Decides, layer by layer, how many of a step's misses the CPU computes. Any thread may call any method.

    ``split`` lets both ends finish together, by what a byte has taken on either in this run. ``auto`` is whichever of
    the three makes whole steps fastest.
    """

    def __init__(
        self, path: str, lender: Lender, tuner: StepTuner[str] | None = None, clock: StepClock | None = None
    ) -> None:
        """``tuner`` and ``clock``: for ``auto``."""
        self.lender = lender
        self.num_computed = 0
        self._path, self._tuner, self._clock = path, tuner, clock
        self._rate = _CpuRate()
        self._lock = threading.Lock()

    @property
    def path(self) -> str:
        """The one that the step under way takes: copy, cpu or split."""
        if self._tuner is None or self._clock is None:
            return self._path
        return self._tuner.setting_after(self._clock.elapsed_s)

    def begin(
        self,
        layer_idx: int,
        x: torch.Tensor,
        top_k_index: torch.Tensor,
        expert_fn: ExpertFn,
        parts: MlpParts | None,
    ) -> HostStep | None:
        """Bring a layer's rows to the host, if its misses may be computed there; None if all are to be copied.

        Without ``parts`` an expert may have more to it than what is in its slot.
        """
        if parts is None or not HostStep.takes(len(x)) or self.path == COPY or not self.lender.lends(layer_idx):
            return None
        return HostStep(self.lender.rows(layer_idx), x, top_k_index, expert_fn, parts)

    def num_copied(self, layer_idx: int, num_missing: int) -> int:
        """How many of so many misses are copied, the rest being computed on the CPU."""
        path = self.path
        if path != SPLIT:
            return num_missing if path == COPY else 0
        copy_s, cpu_s = self.lender.copy_s_per_byte(layer_idx), self._rate.s_per_byte
        num_copied = min(range(num_missing + 1), key=lambda n: max(n * copy_s, (num_missing - n) * cpu_s))
        if num_copied == num_missing:
            self._rate.fade()
        return num_copied

    def computed(self, layer_idx: int, num_experts: int, seconds: float) -> None:
        """The CPU has computed so many experts of a layer, by one call."""
        with self._lock:
            self.num_computed += num_experts
            self._rate.add(seconds, num_experts * self.lender.expert_bytes(layer_idx))


def make_miss_path(miss_path: str, lender: Lender | None, clock: StepClock, turn: Turn) -> MissPath | None:
    """What decides about misses, or None where all are copied."""
    if miss_path == COPY or lender is None:
        return None
    if miss_path != AUTO:
        return MissPath(miss_path, lender)
    tuner = StepTuner(AUTO_ORDER, fallback=COPY, turn=turn)
    clock.tell([tuner])
    return MissPath(AUTO, lender, tuner, clock)
