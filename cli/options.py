"""The options that several commands share, and how they become arguments of the Python interface.

An option that was not given is not passed on: the defaults are those of ``OffloadedModel.from_pretrained``, which the
help repeats (a test compares the two).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from moe_offload.cli import choices
from moe_offload.cli.param_types import DeviceType, FormatType, ModelType, PrefetchType, SizeType, TextType, VramType

Command = TypeVar("Command", bound=Callable[..., Any])

MODEL = ModelType()
TEXT = TextType()


def format_options(command: Command) -> Command:
    """--format, --dense-format, --revision: what a pack is made of."""
    return _apply(_FORMAT_OPTIONS, command)


def load_options(command: Command) -> Command:
    """The arguments of ``OffloadedModel.from_pretrained``: memory, device, cache, formats."""
    return _apply(_MEMORY_OPTIONS + _FORMAT_OPTIONS, command)


def trace_options(command: Command) -> Command:
    """--trace, --trace-tokens: arguments of ``OffloadedModel.from_pretrained`` too."""
    return _apply(_TRACE_OPTIONS, command)


def sampling_options(command: Command) -> Command:
    """How tokens are drawn and how many."""
    return _apply(_SAMPLING_OPTIONS, command)


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``options`` that the user gave, to be passed on as keyword arguments."""
    context = click.get_current_context()
    return {
        name: value for name, value in options.items() if context.get_parameter_source(name) != ParameterSource.DEFAULT
    }


def _apply(options: list[Callable[[Command], Command]], command: Command) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


_MEMORY_OPTIONS: list[Callable[[Any], Any]] = [
    click.option("--ram", type=SizeType(), default="auto", help="RAM to use, like 12GiB or 80%; auto: what is free."),
    click.option(
        "--vram",
        type=VramType(),
        default="auto",
        help="GPU memory to use; auto: what is free; 0=10GiB,1=10GiB: layers divided among GPUs.",
    ),
    click.option("--device", type=DeviceType(), default="auto", help="Where to compute: cpu, cuda, cuda:1."),
    click.option(
        "--context",
        "context_tokens",
        type=click.IntRange(min=1),
        metavar="TOKENS",
        default=4096,
        help="Longest conversation to reserve memory for.",
    ),
    click.option(
        "--policy",
        type=click.Choice(choices.policies()),
        default=choices.default_policy(),
        help="Which experts stay in memory; learned: by what moe-offload learn has fitted.",
    ),
    click.option(
        "--prefetch",
        type=PrefetchType(),
        metavar="off|auto|N",
        default="auto",
        help="Read the experts that the next N layers will probably ask for, when the disk is idle.",
    ),
    click.option(
        "--miss-path",
        type=click.Choice(choices.MISS_PATHS),
        default="copy",
        help="Where a GPU's missing experts are computed: there, after a copy (lossless); by the CPU, from RAM; split "
        "between both; auto: whichever is fastest. All but copy are exact to rounding.",
    ),
    click.option(
        "--graphs",
        type=click.Choice(choices.GRAPHS),
        default="auto",
        help="Run decode steps on a GPU from CUDA graphs; the answer is the same to the bit.",
    ),
    click.option(
        "--warm-start/--no-warm-start",
        default=True,
        help="Begin with the experts that were in use at the end of the last run.",
    ),
    click.option(
        "--verify",
        type=click.Choice(choices.VERIFY),
        default="first",
        help="When to compare an expert with its checksum: the first time it is read, each time, never.",
    ),
    click.option(
        "--dtype", type=click.Choice(choices.DTYPES), default="auto", help="Type to compute in; auto: the model's."
    ),
]

_FORMAT_OPTIONS: list[Callable[[Any], Any]] = [
    click.option(
        "--format",
        type=FormatType(choices.FORMATS),
        default="auto",
        help="How experts are held; source: the checkpoint's own numbers; "
        "auto: those if they are quantised already, else nf4; mixed:3.5: nf3, nf4 and int8, 3.5 bits on average.",
    ),
    click.option(
        "--dense-format",
        type=click.Choice(choices.DENSE_FORMATS),
        default="source",
        help="How the other linear layers are held.",
    ),
    click.option("--revision", metavar="REV", help="Branch, tag or commit of a model on the hub."),
]

_TRACE_OPTIONS: list[Callable[[Any], Any]] = [
    click.option(
        "--trace",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Record routing, cache and times to an .npz, for profile and replay; no text.",
    ),
    click.option("--trace-tokens", is_flag=True, help="Record the ids of tokens too: whoever has them has the text."),
]

_SAMPLING_OPTIONS: list[Callable[[Any], Any]] = [
    click.option(
        "--temperature",
        type=click.FloatRange(min=0),
        help="0: always the likeliest token. By default what the model recommends, and 0 if it recommends nothing.",
    ),
    click.option(
        "--top-p", type=click.FloatRange(0, 1, min_open=True), help="Draw from the likeliest tokens of this share."
    ),
    click.option("--top-k", type=click.IntRange(min=1), help="Draw from this many of the likeliest tokens."),
    click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="Draw the same tokens each time."),
]
