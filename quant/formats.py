"""The registry: every format by the name that ``--format`` and pack.json use."""

import re
from collections.abc import Callable
from functools import cache

from moe_offload.errors import FormatError
from moe_offload.quant.base import Format
from moe_offload.quant.eight_bit import INT8, fp8_format
from moe_offload.quant.four_bit import INT4, MXFP4, NF4, bnb_format
from moe_offload.quant.raw import RawFormat
from moe_offload.quant.three_bit import NF3

# What --format offers, in the order that help shows.
_OFFERED: dict[str, Format] = {
    "bf16": RawFormat("bf16"),
    "int8": INT8,
    "nf4": NF4,
    "int4": INT4,
    "mxfp4": MXFP4,
    "nf3": NF3,
    "fp8": fp8_format(),
}
# What only a checkpoint's own numbers ask for.
_SOURCE_ONLY: dict[str, Format] = {"fp16": RawFormat("fp16"), "fp32": RawFormat("fp32")}
_PARAMETRISED: dict[str, Callable[[re.Match[str]], Format]] = {
    r"fp8-(\d{1,9})x(\d{1,9})": lambda match: fp8_format(int(match[1]), int(match[2])),
    r"bnb-(nf4|fp4)-(\d{1,4})": lambda match: bnb_format(match[1], int(match[2])),
}


def format_names() -> tuple[str, ...]:
    """The formats a user can choose."""
    return tuple(_OFFERED)


@cache
def get_format(spec: str) -> Format:
    """The format named ``spec``; raises FormatError, listing the known ones, if there is none."""
    if known := _OFFERED.get(spec) or _SOURCE_ONLY.get(spec):
        return known
    for pattern, make in _PARAMETRISED.items():
        if match := re.fullmatch(pattern, spec):
            return make(match)
    raise FormatError(
        f"unknown format {spec!r}; known: {', '.join((*_OFFERED, *_SOURCE_ONLY))}, "
        "fp8-ROWSxCOLS, bnb-nf4-BLOCK, bnb-fp4-BLOCK"
    )
