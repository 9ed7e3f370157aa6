"""The numbers behind each code: sixteen-entry tables, and the bounds between one code and the next."""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# QLoRA's NormalFloat4 (https://arxiv.org/abs/2305.14314), the same fp32 values as bitsandbytes.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# GGUF's Q4_0: the code less eight.
INT4 = tuple(float(code - 8) for code in range(16))
# OCP MX v1.0, e2m1: a sign bit over eight magnitudes.
_E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = _E2M1_MAGNITUDES + tuple(-magnitude for magnitude in _E2M1_MAGNITUDES)
# bitsandbytes' own fp4, normalised to 1; not in the order of its values.
_BNB_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)

# Sixteen tables in units of 1/128, of which each group of 32 weights picks one; weights are scaled by their row's root
# mean square. The first fourteen, seven and their mirror images, were fitted by Lloyd's algorithm on groups of normal
# numbers whose deviations differ by a factor of 2**(normal number / 4), a sixth of the rows with the longer tails of
# Student's t of 8 degrees. The last two are for groups with outliers; only the last has a zero.
NF3_UNIT = 128
NF3_TABLES = (
    (-196, -128, -78, -34, 10, 54, 103, 164),
    (-243, -160, -96, -41, 13, 69, 132, 219),
    (-246, -143, -81, -31, 14, 59, 111, 179),
    (-297, -195, -115, -48, 16, 83, 162, 275),
    (-313, -175, -98, -37, 19, 73, 135, 213),
    (-379, -216, -123, -48, 19, 88, 167, 271),
    (-482, -259, -144, -58, 20, 102, 201, 347),
    (-164, -103, -54, -10, 34, 78, 128, 196),
    (-219, -132, -69, -13, 41, 96, 160, 243),
    (-179, -111, -59, -14, 31, 81, 143, 246),
    (-275, -162, -83, -16, 48, 115, 195, 297),
    (-213, -135, -73, -19, 37, 98, 175, 313),
    (-271, -167, -88, -19, 48, 123, 216, 379),
    (-347, -201, -102, -20, 58, 144, 259, 482),
    (-1152, -410, -166, -51, 51, 166, 410, 1152),
    (-7168, -2304, -768, -102, 0, 102, 1792, 5120),
)

E4M3_MAX = 448.0
E2M1_MAX_EXPONENT = 2  # of its largest value, 6 = 1.5 * 2**2
E8M0_BIAS = 127
E8M0_NAN = 255
FP16_MAX = 65504.0


@dataclass(frozen=True)
class CodeTable:
    """What the sixteen codes stand for, and the sorted bounds that pick one: ``order[#(bounds < value)]``."""

    name: str
    values: tuple[float, ...]
    bounds: tuple[float, ...]
    order: tuple[int, ...]

    def to(self, device: torch.device) -> Tensor:
        return _values_on(self, device)


@cache
def _values_on(table: CodeTable, device: torch.device) -> Tensor:
    return torch.tensor(table.values, dtype=torch.float32, device=device)


def _midpoint_table(name: str, values: Tensor) -> CodeTable:
    order = sorted(range(16), key=lambda code: (float(values[code]), code))
    in_order = values[order]
    # fp32 midpoints, as bitsandbytes computes them: equal codes need equal bounds
    bounds = (in_order[:-1] + in_order[1:]) / 2
    return CodeTable(name, tuple(values.tolist()), tuple(bounds.tolist()), tuple(order))


def _e2m1_table() -> CodeTable:
    """Round to nearest, ties to the even mantissa (OCP MX v1.0), written as strict bounds; no code for minus zero."""
    # a value above its bound takes the next magnitude, so a tie that goes up needs the float just below it
    magnitude_bounds = (0.25, _next(0.75, 0.0), 1.25, _next(1.75, 0.0), 2.5, _next(3.5, 0.0), 5.0)
    bounds = (*(-_next(bound, math.inf) for bound in reversed(magnitude_bounds)), *magnitude_bounds, math.inf)
    return CodeTable("e2m1", E2M1, bounds, (*range(15, 8, -1), *range(8), 7))


def _next(value: float, towards: float) -> float:
    return float(torch.nextafter(torch.tensor(value), torch.tensor(towards)))


NF4_TABLE = _midpoint_table("nf4", torch.tensor(NF4))
INT4_TABLE = _midpoint_table("int4", torch.tensor(INT4))
E2M1_TABLE = _e2m1_table()
BNB_FP4_TABLE = _midpoint_table("fp4", torch.tensor(_BNB_FP4_MAGNITUDES + tuple(-m for m in _BNB_FP4_MAGNITUDES)) / 12)
