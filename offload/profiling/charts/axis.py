"""The range of numbers along one side of a chart."""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """From ``low`` to ``high``, with ticks at some numbers between; ``label`` says what is measured."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...] = ()

    def share(self, value: float) -> float:
        """How far along the axis a number lies: 0 at its low end, 1 at its high end, never outside."""
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))


def number_axis(label: str, low: float, high: float, write: Callable[[float], str], *, ticks: int = 4) -> Axis:
    """An axis that ends where the numbers end, with about so many ticks at the round numbers between."""
    if high <= low:
        return Axis(label, low, low + 1, ((low, write(low)),))
    step = round_step((high - low) / ticks)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Axis(label, low, high, tuple((index * step, write(index * step)) for index in range(first, last + 1)))


def index_axis(label: str, count: int, *, first: int = 0, step: int = 1, ticks: int = 8) -> Axis:
    """An axis of things that are counted: the i-th takes the space from i to i + 1, and its tick stands in the middle.

    The i-th has the number ``first + step * i``.
    """
    every = max(1, math.ceil(round_step(count / ticks))) if count else 1
    marks = tuple((index + 0.5, str(first + step * index)) for index in range(0, count, every))
    return Axis(label, 0, max(1, count), marks)


def round_step(at_least: float) -> float:
    """The first of 1, 2, 2.5, 5 or 10 times a power of ten that is not below ``at_least``."""
    power = 10.0 ** math.floor(math.log10(at_least))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= at_least * (1 - 1e-9))
