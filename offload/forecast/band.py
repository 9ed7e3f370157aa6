"""Quantities that are not known exactly, and what follows from several of them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Band:
    """From ``low`` to ``high``, with ``mid`` as the best guess."""

    low: float
    mid: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.mid <= self.high:
            raise ValueError(f"{self.mid} is not between {self.low} and {self.high}")

    @classmethod
    def exactly(cls, value: float) -> "Band":
        """A value that is known."""
        return cls(value, value, value)

    def scaled(self, factor: float) -> "Band":
        """All of it times ``factor``, which is above zero."""
        return Band(self.low * factor, self.mid * factor, self.high * factor)

    def inverse(self) -> "Band":
        """One over it: a rate from a time."""
        return Band(1 / self.high, 1 / self.mid, 1 / self.low)

    def contains(self, value: float) -> bool:
        """Whether ``value`` lies in it, its ends included."""
        return self.low <= value <= self.high

    def to_dict(self) -> dict[str, float]:
        """As JSON has it."""
        return asdict(self)


def propagate(formula: Callable[[Mapping[str, float]], float], factors: Mapping[str, Band]) -> Band:
    """The band of a positive quantity that ``formula`` computes from values by name.

    Factors are taken to err independently of one another: each is moved to its ends alone, and the logarithms of what
    that changes are added in quadrature, upwards and downwards apart (as first-order propagation of errors does).
    """
    mids = {name: factor.mid for name, factor in factors.items()}
    mid = formula(mids)
    up = down = 0.0
    for name, factor in factors.items():
        changes = [math.log(formula(mids | {name: end}) / mid) for end in (factor.low, factor.high)]
        up += max(0.0, *changes) ** 2
        down += min(0.0, *changes) ** 2
    return Band(mid * math.exp(-math.sqrt(down)), mid, mid * math.exp(math.sqrt(up)))
