"""How figures of a report are written for people; None is a dash."""

from moe_offload.offload.planning.sizes import format_size

NONE = "-"


def percent(share: float | None, digits: int = 0) -> str:
    """ "64%"."""
    return NONE if share is None else f"{share:.{digits}%}"


def speed(tokens_per_s: float | None) -> str:
    """ "12.3 tok/s", in three digits."""
    if tokens_per_s is None:
        return NONE
    digits = 0 if tokens_per_s >= 99.95 else 1 if tokens_per_s >= 9.995 else 2
    return f"{tokens_per_s:.{digits}f} tok/s"


def seconds(value: float | None) -> str:
    """ "3.2 ms", in two or three digits."""
    if value is None:
        return NONE
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        amount = value * factor
        if amount >= 0.9995 or unit == "us":
            return f"{amount:.0f} {unit}" if amount >= 99.5 else f"{amount:.1f} {unit}"
    raise AssertionError


def size(num_bytes: float | None) -> str:
    """ "3.6 MiB"."""
    return NONE if num_bytes is None else format_size(round(num_bytes))


def rate(bytes_per_s: float | None) -> str:
    """ "2.4 GB/s"."""
    return NONE if bytes_per_s is None else f"{bytes_per_s / 1e9:.3g} GB/s"
