"""Numbers as people read them."""

from collections.abc import Callable

from moe_offload.offload.planning.sizes import format_size
from moe_offload.offload.profiling.charts.axis import Axis, number_axis

UNKNOWN = "\N{EN DASH}"


def percent(share: float | None, decimals: int = 1) -> str:
    """ "87.4 %"."""
    return UNKNOWN if share is None else f"{100 * share:.{decimals}f} %"


def whole_percent(share: float | None) -> str:
    """ "87 %"."""
    return percent(share, 0)


def duration(seconds: float | None) -> str:
    """In three digits at most: "850 µs", "12.3 ms", "1.24 s", "95 s"."""
    if seconds is None:
        return UNKNOWN
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit * 0.9995:
            return f"{three_digits(seconds / unit)} {name}"
    return "0 s" if seconds == 0 else f"{three_digits(seconds / 1e-6)} µs"


def size(size_bytes: float | None) -> str:
    """ "1.4 GiB"."""
    return UNKNOWN if size_bytes is None else format_size(round(size_bytes))


def count(number: float | None) -> str:
    """ "12,345"."""
    return UNKNOWN if number is None else f"{number:,.0f}"


def three_digits(number: float | None) -> str:
    """ "0.52", "7.25", "18.3", "1,204": as many decimals as three digits leave."""
    if number is None:
        return UNKNOWN
    if number == int(number):
        return f"{number:,.0f}"
    return f"{number:,.{2 if number < 9.995 else 1 if number < 99.95 else 0}f}"


def signed_percent(share: float) -> str:
    """ "+25 %"."""
    return f"{100 * share:+.0f} %"


def in_unit(unit: float, name: str) -> Callable[[float], str]:
    """Writes numbers as multiples of ``unit``: for the ticks of an axis, which share one."""
    return lambda value: f"{value / unit:.10g} {name}"


def time_axis(label: str, longest_s: float) -> Axis:
    """From 0 to about ``longest_s``, its ticks in one unit of time."""
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if longest_s >= unit:
            return number_axis(label, 0, longest_s, in_unit(unit, name))
    return number_axis(label, 0, longest_s, in_unit(1e-6, "µs"))


def percent_axis(label: str, highest: float = 1.0) -> Axis:
    """From 0 to ``highest``."""
    return number_axis(label, 0, highest, in_unit(0.01, "%"))
