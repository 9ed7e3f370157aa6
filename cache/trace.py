"""A routing trace: what a run asked its experts for, what came of it, and where the time went."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_offload.errors import ConfigError

TRACE_VERSION = 1

Array = npt.NDArray[Any]


class Outcome(IntEnum):
    """What a token found of an expert that it chose, at that layer."""

    RESIDENT = 0
    PREFETCHED = 1  # and there in time
    LATE = 2  # prefetched, and waited for
    MISSED = 3
    BYPASSED = 4  # missed, and given no slot
    UNKNOWN = 255


class TransferKind(IntEnum):
    """Why an expert was read."""

    DEMAND = 0
    USED = 1  # speculative, and asked for
    WASTED = 2  # speculative, and cancelled or never asked for
    WARM = 3  # what an earlier run found hot


class CopyKind(IntEnum):
    """Whether anybody waited for a copy to a device when it was enqueued."""

    DEMAND = 0
    AHEAD = 1


class EventKind(IntEnum):
    """What was asked of the cache, or told to it."""

    ACQUIRE = 0  # `ExpertCache.acquire` in a decode step; replay takes it for one with `Admit.ALWAYS`
    ACQUIRE_IF_HOTTER = 1  # with `Admit.IF_HOTTER`: a prompt
    NEW_SEQUENCE = 2
    PREFETCH = 3  # `admit_prefetch`, into empty slots only
    PREFETCH_EVICTING = 4
    LOADED = 5  # `mark_loaded`; only what no step waits for: prefetched, warmed, or computed on the CPU
    DROPPED = 6  # `drop_prefetch`
    FAILED = 7  # `mark_failed`
    WARM = 8  # `admit_warm`
    REMEMBER = 9
    RESIZE = 10  # the one number of the event is the number of slots
    RESIDENT = 11  # at the beginning of the trace: the layer's loaded experts, by slot


# What each array is: its dtype, and its axes. Axes of one name are as long as each other.
LAYOUT: dict[str, tuple[str, tuple[str, ...]]] = {
    "experts": ("int16", ("tokens", "layers", "top_k")),
    "sequence": ("int32", ("tokens",)),
    "phase": ("uint8", ("tokens",)),
    "probs": ("float16", ("tokens", "layers", "top_k")),
    "outcome": ("uint8", ("tokens", "layers", "top_k")),
    "predicted": ("int16", ("tokens", "layers", "distances", "predicted experts")),
    "distance": ("int16", ("distances",)),
    "token_ids": ("int32", ("tokens",)),
    "num_experts": ("int32", ("layers",)),
    "num_slots": ("int32", ("layers",)),
    "expert_bytes": ("int64", ("layers",)),
    "step": ("int32", ("tokens",)),
    "step_begin_us": ("int64", ("steps",)),
    "step_us": ("uint32", ("steps",)),
    "step_tokens": ("int32", ("steps",)),
    "layer_us": ("uint32", ("steps", "layers", "four times")),
    "transfer_layer": ("int16", ("transfers",)),
    "transfer_expert": ("int16", ("transfers",)),
    "transfer_begin_us": ("int64", ("transfers",)),
    "transfer_end_us": ("int64", ("transfers",)),
    "transfer_bytes": ("uint32", ("transfers",)),
    "transfer_kind": ("uint8", ("transfers",)),
    "copy_device": ("uint8", ("copies",)),
    "copy_begin_us": ("int64", ("copies",)),
    "copy_ns": ("uint32", ("copies",)),
    "copy_bytes": ("uint32", ("copies",)),
    "copy_kind": ("uint8", ("copies",)),
    "link_bytes_per_s": ("float32", ("links",)),
    "event_kind": ("uint8", ("events",)),
    "event_layer": ("int16", ("events",)),
    "event_token": ("int32", ("events",)),
    "event_size": ("int32", ("events",)),
    "event_experts": ("int16", ("experts of events",)),
    "event_weights": ("float32", ("experts of events",)),
}
LAYER_TIMES = ("dense", "router", "wait", "experts")
# These make sense only together.
_TOGETHER = (
    ("predicted", "distance"),
    ("step", "step_begin_us", "step_us", "step_tokens"),
    tuple(name for name in LAYOUT if name.startswith("transfer_")),
    tuple(name for name in LAYOUT if name.startswith("copy_")),
    tuple(name for name in LAYOUT if name.startswith("event_")),
)


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """The arrays of a trace, in the order in which the tokens were computed; all but ``experts`` may be None.

    Shapes and dtypes are those of `LAYOUT`, units and codes those of docs/trace-format.md. Integers of another width
    are converted, if their values fit. ConfigError for anything else.
    """

    experts: Array
    sequence: Array | None = None
    phase: Array | None = None
    probs: Array | None = None
    outcome: Array | None = None
    predicted: Array | None = None
    distance: Array | None = None
    token_ids: Array | None = None
    num_experts: Array | None = None
    num_slots: Array | None = None
    expert_bytes: Array | None = None
    step: Array | None = None
    step_begin_us: Array | None = None
    step_us: Array | None = None
    step_tokens: Array | None = None
    layer_us: Array | None = None
    transfer_layer: Array | None = None
    transfer_expert: Array | None = None
    transfer_begin_us: Array | None = None
    transfer_end_us: Array | None = None
    transfer_bytes: Array | None = None
    transfer_kind: Array | None = None
    copy_device: Array | None = None
    copy_begin_us: Array | None = None
    copy_ns: Array | None = None
    copy_bytes: Array | None = None
    copy_kind: Array | None = None
    link_bytes_per_s: Array | None = None
    event_kind: Array | None = None
    event_layer: Array | None = None
    event_token: Array | None = None
    event_size: Array | None = None
    event_experts: Array | None = None
    event_weights: Array | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths: dict[str, tuple[int, str]] = {"four times": (len(LAYER_TIMES), "layer_us")}
        for name, array in self.arrays().items():
            object.__setattr__(self, name, _checked(name, array, lengths))
        for names in _TOGETHER:
            missing = [name for name in names if getattr(self, name) is None]
            if missing and len(missing) < len(names):
                raise ConfigError(f"a trace with any of {', '.join(names)} needs them all, and has no {missing[0]}")
        if self.layer_us is not None and self.step_us is None:
            raise ConfigError("a trace with layer_us needs step_us")
        self._check_values()

    @property
    def num_tokens(self) -> int:
        return int(self.experts.shape[0])

    @property
    def num_layers(self) -> int:
        return int(self.experts.shape[1])

    @property
    def top_k(self) -> int:
        """The largest of any layer; layers with fewer are padded with -1."""
        return int(self.experts.shape[2])

    def arrays(self) -> dict[str, Array]:
        """Those that are there, by name."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "meta"}
        return {name: array for name, array in values.items() if array is not None}

    def step_at(self, times_us: Array) -> Array:
        """The step that had begun last at each of the times, -1 for none; needs ``step_begin_us``."""
        assert self.step_begin_us is not None
        order = np.argsort(self.step_begin_us, kind="stable")  # steps of several threads end in another order
        place = np.searchsorted(self.step_begin_us[order], times_us, side="right")
        return np.append(-1, order)[place]

    def _check_values(self) -> None:
        """What is used as an index must be one."""
        limit = np.full(self.num_layers, np.iinfo(np.int16).max) if self.num_experts is None else self.num_experts
        for name in ("experts", "predicted"):
            array = getattr(self, name)
            if array is not None and array.size:
                above = array >= limit.reshape(1, -1, *[1] * (array.ndim - 2))
                if array.min() < -1 or above.any():
                    raise ConfigError(f"{name} of a trace must be experts of their layer, or -1")
        bounds = {
            "phase": 2,
            "step": None if self.step_us is None else len(self.step_us),
            "transfer_layer": self.num_layers,
            "copy_kind": len(CopyKind),
            "copy_device": None if self.link_bytes_per_s is None else len(self.link_bytes_per_s),
            "event_kind": len(EventKind),
        }
        for name, bound in bounds.items():
            array = getattr(self, name)
            if array is not None and bound is not None and array.size and (array.min() < 0 or array.max() >= bound):
                raise ConfigError(f"{name} of a trace must lie in 0..{bound - 1}")
        if self.event_size is not None and self.event_size.size and self.event_size.min() < 0:
            raise ConfigError("event_size of a trace must not be negative")
        if self.event_size is not None and self.event_experts is not None:
            given = int(self.event_size.sum(dtype=np.int64))
            if given != len(self.event_experts):
                raise ConfigError(
                    f"the events of a trace name {given} experts, event_experts has {len(self.event_experts)}"
                )


def _checked(name: str, value: Any, lengths: dict[str, tuple[int, str]]) -> Array:
    """The array in its dtype; ``lengths``: axis -> its length and whose it is, added to."""
    dtype, axes = LAYOUT[name]
    array, wanted = np.asarray(value), np.dtype(dtype)
    written = f"[{', '.join(axes)}]"
    if array.ndim != len(axes):
        raise ConfigError(f"{name!r} of a trace has shape {array.shape}, not {written}")
    if array.dtype.kind not in ("iu" if wanted.kind in "iu" else "f"):
        raise ConfigError(f"{name!r} of a trace is {array.dtype}, not {dtype}")
    for axis, length in zip(axes, array.shape, strict=True):
        expected, owner = lengths.setdefault(axis, (length, name))
        if length != expected:
            raise ConfigError(
                f"{name!r} of a trace is {array.shape}, not {written} with {expected} {axis} as {owner!r}"
            )
    if array.dtype == wanted:
        return array
    if wanted.kind in "iu" and array.size:
        limits = np.iinfo(wanted)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise ConfigError(f"{name!r} of a trace has values outside {dtype}")
    return array.astype(wanted)
