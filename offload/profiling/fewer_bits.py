"""The next smaller format of the experts."""

from dataclasses import dataclass

from moe_offload.errors import FormatError

_SMALLER = 0.85  # else it is hardly worth another pack
_PREFERRED = "nf4"  # among formats of one size


@dataclass(frozen=True)
class SmallerFormat:
    """A format, and its size over that of the one in use."""

    spec: str
    size_factor: float


def next_format(spec: str | None, bits: float | None) -> SmallerFormat | None:
    """The largest format clearly smaller than the one in use, which has ``bits`` a weight if that is known."""
    from moe_offload.quant import format_names, get_format

    if bits is None:
        try:
            bits = get_format(spec or "").bits_per_weight()
        except FormatError:
            return None
    sizes = {name: get_format(name).bits_per_weight() for name in format_names()}
    smaller = [name for name, size in sizes.items() if size <= _SMALLER * bits]
    if not smaller:
        return None
    # Four-bit formats differ by a few hundredths of a bit for their scales: they count as one size.
    best = max(smaller, key=lambda name: (round(sizes[name]), name == _PREFERRED, sizes[name]))
    return SmallerFormat(best, sizes[best] / bits)
