"""What to do, in one sentence and one command."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moe_offload.offload.bench.presets import CUSTOM_CODE, HUB_IDS
from moe_offload.offload.forecast.machine import Machine
from moe_offload.offload.forecast.model_shape import SOURCE, ModelShape, PackedShape
from moe_offload.offload.planning.sizes import format_size

if TYPE_CHECKING:
    from moe_offload.offload.forecast.forecast import FormatForecast

# As fast as people read; below it a format of fewer bits is worth its loss, but never below the default four bits
# unless those would crawl.
_READING_TOKENS_PER_S = 5.0
_CRAWLING_TOKENS_PER_S = 1.0
_MIB = 1024**2


@dataclass(frozen=True)
class Recommendation:
    """``format`` and ``command`` are None where nothing fits; a model that cannot be loaded has no command."""

    format: str | None
    sentence: str
    command: str | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def recommend(
    shape: ModelShape | PackedShape, formats: "Sequence[FormatForecast]", machine: Machine, *, context_tokens: int
) -> Recommendation:
    """The format with the most bits that is fast enough to read along; else the default, unless fewer bits save it."""
    fitting = [item for item in formats if item.speed is not None]
    if not fitting:
        return _nothing_fits(shape, formats, machine)
    best = _choose(fitting, shape)
    assert best.speed is not None
    command = None if shape.name in CUSTOM_CODE else _command(shape, best, machine, context_tokens)
    speed = best.speed.decode.tokens_per_s
    if best.speed.plan.fewest_share >= 1:
        place = f"all experts stay in {'RAM' if machine.device == 'cpu' else 'VRAM'}"
    else:
        found, reached = f"{best.speed.hit_ratio.mid:.0%}", f"{best.speed.reach.mid:.0%}"
        memory = "memory" if machine.device == "cpu" else f"VRAM, {reached} in VRAM or RAM"
        place = f"{found} of a token's experts are found in {memory}"
    first = best.speed.time_to_first_token_s
    sentence = (
        f"Run it in {best.format}: {place}, {_span(speed.low, speed.high)} tokens a second, the first after "
        f"{_span(first.low, first.high)} s"
    )
    if isinstance(shape, ModelShape):
        sentence += f"; the pack takes {format_size(best.pack_bytes)} of disk"
    if command is None:
        sentence += ". That is its shape: it is published with code of its own, which moe-offload does not run"
    return Recommendation(best.format, sentence + ".", command)


def _choose(fitting: "Sequence[FormatForecast]", shape: ModelShape | PackedShape) -> "FormatForecast":
    def mid(item: "FormatForecast") -> float:
        assert item.speed is not None
        return item.speed.decode.tokens_per_s.mid

    if isinstance(shape, PackedShape):
        return fitting[0]
    own = next((item for item in fitting if item.format == SOURCE), None)
    if shape.is_quantized and own is not None:  # more bits than the checkpoint has would hold nothing more
        fitting = [item for item in fitting if item is own or item.pack_bytes < own.pack_bytes]
    by_size = sorted(fitting, key=lambda item: -item.pack_bytes)
    usual = next((item for item in by_size if item.format == shape.default_format), None)
    readable = [item for item in by_size if item.speed and item.speed.decode.tokens_per_s.low >= _READING_TOKENS_PER_S]
    if usual is None:
        return readable[0] if readable else max(fitting, key=mid)
    # More bits than the default only where they cost no speed that anybody would notice.
    if readable and readable[0].pack_bytes > usual.pack_bytes:
        return readable[0]
    smaller = [item for item in by_size if item.pack_bytes < usual.pack_bytes]
    if mid(usual) < _CRAWLING_TOKENS_PER_S and smaller:
        return max(smaller, key=mid)
    return usual


def _command(shape: ModelShape | PackedShape, item: "FormatForecast", machine: Machine, context_tokens: int) -> str:
    words = ["moe-offload", "chat", HUB_IDS.get(shape.name, shape.name)]
    if isinstance(shape, ModelShape):
        if item.format != shape.default_format:
            words += ["--format", item.format]
        if item.dense_format != SOURCE:
            words += ["--dense-format", item.dense_format]
    if machine.gpus:
        words += ["--vram", ",".join(f"{index}={_typed(size_bytes)}" for index, size_bytes in machine.gpus)]
    elif machine.vram_bytes is not None:
        words += ["--vram", _typed(machine.vram_bytes)]
    words += ["--ram", _typed(machine.ram_bytes)]
    if context_tokens != 4096:
        words += ["--context", str(context_tokens)]
    return shlex.join(words)


def _nothing_fits(
    shape: ModelShape | PackedShape, formats: "Sequence[FormatForecast]", machine: Machine
) -> Recommendation:
    refused = [item for item in formats if item.refusal is not None]
    smallest = min(refused, key=lambda item: item.refusal.needed_bytes if item.refusal else 0)
    assert smallest.refusal is not None
    if machine.gpus:  # which of them is too small, and for what, depends on how they share the layers
        return Recommendation(None, f"No format fits. In {smallest.format}, {smallest.refusal}.", None)
    option = "--ram" if machine.device == "cpu" else "--vram"
    needed = -(-smallest.refusal.needed_bytes // _MIB)
    return Recommendation(
        None,
        f"No format fits in {format_size(smallest.refusal.budget_bytes)}: the least that would do is {option} "
        f"{needed}MiB, in {smallest.format} with the dense part in {smallest.dense_format}.",
        None,
    )


def _typed(size_bytes: int) -> str:
    """A budget to type: whole GiB where it is, else MiB, rounded down."""
    gib, rest = divmod(size_bytes, 1024**3)
    return f"{gib}GiB" if not rest else f"{size_bytes // _MIB}MiB"


def _span(low: float, high: float) -> str:
    """ "4.1 to 6.9", or one number where both look the same."""
    texts = [_digits(low), _digits(high)]
    return texts[0] if texts[0] == texts[1] else f"{texts[0]} to {texts[1]}"


def _digits(number: float) -> str:
    return f"{number:.0f}" if number >= 9.95 else f"{number:.1f}" if number >= 0.995 else f"{number:.2g}"
