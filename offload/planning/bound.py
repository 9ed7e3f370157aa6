"""The most tokens a second that a machine's rates allow."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Bottleneck = Literal["compute", "memory", "disk", "pcie"]


@dataclass(frozen=True)
class Bound:
    """Tokens a second, and which rate sets them."""

    tokens_per_s: float
    by: Bottleneck


def bound_of(seconds: Mapping[Bottleneck, float]) -> Bound:
    """1 / the longest of the times that one token takes, if all else is done meanwhile; on a tie the first's.

    A token's times are its bytes from memory / memory rate, bytes missed / disk rate, bytes copied / PCIe rate; of a
    prompt's token, operations / rate of matrix products.
    """
    by = max(seconds, key=lambda name: seconds[name])
    return Bound(1 / seconds[by] if seconds[by] > 0 else float("inf"), by)
