"""What every process of a comparison runs under."""

import contextlib
from dataclasses import dataclass

from control_group import SUSTAINED_S, ControlGroup, Limit, MemoryLimit, ReadLimit, control_group

_DISK_S = 1.0


@dataclass(frozen=True)
class Conditions:
    """``limits_memory``: whether memory can be limited here; ``reading``: what the disk is held to, if anything."""

    limits_memory: bool
    reading: ReadLimit | None = None

    def engine_group(self, limit_bytes: int | None) -> contextlib.AbstractContextManager[ControlGroup]:
        """For one engine: its memory is counted, and limited where there is a limit."""
        limits: list[Limit] = [MemoryLimit(limit_bytes)] if self.limits_memory else []
        return control_group(limits + self._reading())

    def rates_group(self) -> contextlib.AbstractContextManager[ControlGroup]:
        """For the process that measures the machine's rates."""
        return control_group(self._reading())

    @property
    def disk_s(self) -> float:
        """How long to read for the disk's rate."""
        return _DISK_S if self.reading is None else SUSTAINED_S

    def _reading(self) -> list[Limit]:
        return [] if self.reading is None else [self.reading]
