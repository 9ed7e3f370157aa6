"""Amounts of memory as people write them: "6GiB", "512 MB", "80%", "auto"; and rates: "3.5GB/s"."""

import re

from moe_offload.errors import ConfigError

# As elsewhere in computing: KiB and a bare letter are powers of 1024 (docker, java), KB is a power of 1000 (SI).
_UNITS: dict[str, int] = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {_letter: 1024**_power, f"{_letter}ib": 1024**_power, f"{_letter}b": 1000**_power}

_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*|%)", re.IGNORECASE)
_EXAMPLES = 'write it as "6GiB", "512MiB", "80%" or "auto"'
_RATE_EXAMPLES = "write it as 3.5GB/s or 800MB/s"


def parse_size(size: str | int, *, total_bytes: int, free_bytes: int, margin_bytes: int = 0) -> int:
    """Bytes meant by ``size``: "80%" is of ``total_bytes``, "auto" is ``free_bytes`` less ``margin_bytes``.

    Raises ConfigError for what is not a size above zero.
    """
    if isinstance(size, bool) or not isinstance(size, str | int):
        raise ConfigError(f"{size!r} is not a size; {_EXAMPLES}")
    if isinstance(size, int):
        size_bytes = size
    elif size.strip().lower() == "auto":
        return max(0, free_bytes - margin_bytes)
    else:
        size_bytes = _parse_number_and_unit(size.strip(), total_bytes)
    if size_bytes <= 0:
        raise ConfigError(f"{size!r} is not a size above zero; {_EXAMPLES}")
    return size_bytes


def parse_rate(rate: str) -> int:
    """Bytes a second meant by "3.5GB/s", or "3.5GB" for short; ConfigError for what is no rate above zero."""
    text = rate.strip().removesuffix("/s")
    if text.endswith("%") or text.lower() == "auto":
        raise ConfigError(f"{rate!r} is not a rate; {_RATE_EXAMPLES}")
    try:
        return parse_size(text, total_bytes=1, free_bytes=1)
    except ConfigError:
        raise ConfigError(f"{rate!r} is not a rate; {_RATE_EXAMPLES}") from None


def format_size(size_bytes: int) -> str:
    """The size as people read it, in two or three digits: "5.9 GiB", "512 MiB", "17 B"."""
    if size_bytes < 0:
        return "-" + format_size(-size_bytes)
    amount, unit = float(size_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 999.5:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:.0f} {unit}" if unit == "B" or amount >= 99.95 else f"{amount:.1f} {unit}"


def _parse_number_and_unit(text: str, total_bytes: int) -> int:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is not a size; {_EXAMPLES}")
    number, unit = float(match.group(1)), match.group(2)
    if unit == "%":
        if number > 100:
            raise ConfigError(f"{text!r} is more memory than there is; {_EXAMPLES}")
        return int(number / 100 * total_bytes)
    if unit.lower() not in _UNITS:
        raise ConfigError(f"{unit!r} in {text!r} is not a unit of memory; use KiB, MiB, GiB, TiB or %")
    return int(number * _UNITS[unit.lower()])
