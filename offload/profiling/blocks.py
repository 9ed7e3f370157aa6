"""Pictures made of characters: bars, sparklines, heat strips."""

from collections.abc import Sequence
from itertools import pairwise

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_HEIGHTS = "▁▂▃▄▅▆▇█"
_SHADES = " ░▒▓█"


def bar(share: float, width: int) -> str:
    """A bar of ``share`` of the width, to an eighth of a character."""
    eighths = round(min(1.0, max(0.0, share)) * width * 8)
    whole, rest = divmod(eighths, 8)
    return "█" * whole + (_EIGHTHS[rest] if rest else "")


def sparkline(values: Sequence[float], width: int) -> str:
    """One character per value, or per mean of neighbours where there are more than fit; from zero to the largest."""
    values = condensed(values, width)
    top = max(values, default=0.0)
    return "".join(_HEIGHTS[round(value / top * 7) if top else 0] for value in values)


def heat(values: Sequence[float], width: int) -> str:
    """As `sparkline`, in shades; nothing but zero is blank."""
    values = condensed(values, width)
    top = max(values, default=0.0)
    return "".join(_SHADES[0 if value <= 0 else 1 + min(3, int(value / top * 4))] for value in values)


def condensed(values: Sequence[float], width: int) -> list[float]:
    """At most ``width`` means of neighbours."""
    if len(values) <= width:
        return list(values)
    edges = [index * len(values) // width for index in range(width + 1)]
    return [sum(values[begin:end]) / (end - begin) for begin, end in pairwise(edges)]
