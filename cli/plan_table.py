"""What ``moe-offload plan`` shows: the machine, a line for every format, the recommendation; or how a run compares."""

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moe_offload.offload.planning.sizes import format_size

if TYPE_CHECKING:
    from moe_offload.offload.forecast.band import Band
    from moe_offload.offload.forecast.forecast import Forecast, FormatForecast
    from moe_offload.offload.forecast.machine import Machine, Rate
    from moe_offload.offload.forecast.verdict import Verdict

_COLUMNS = ("format", "dense", "pack", "packing", "kept", "hits", "tok/s", "first token", "by")
_LEFT = ("format", "dense", "by")
_FOLDED = ("kept", "hits")  # on a narrow terminal
_LIMITS = {"memory": "memory", "disk": "disk", "copy": "PCIe"}


def forecast_view(found: "Forecast", free_bytes: int) -> RenderableType:
    """The whole forecast; ``free_bytes``: on the disk here that packs go to."""
    grid = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for title in _COLUMNS:
        grid.add_column(title, justify="left" if title in _LEFT else "right", no_wrap=title not in _FOLDED)
    for item in found.formats:
        grid.add_row(*_cells(item), style="bold" if item.format == found.recommendation.format else "")
    parts: list[RenderableType] = [Text("\n".join([*_model_lines(found), *_machine_lines(found.machine)])), grid]
    refusals = [item for item in found.formats if item.refusal is not None]
    if refusals:
        option = "--ram" if found.machine.device == "cpu" else "--vram"
        least = [
            f"{item.format} from {option} {format_size(item.refusal.needed_bytes)}" for item in refusals if item.refusal
        ]
        parts.append(Text(f"does not fit: {'; '.join(least)}\n", style="yellow"))
    parts.append(Text(found.recommendation.sentence, style="bold"))
    if found.recommendation.command is not None:
        parts.append(Text(found.recommendation.command, style="cyan"))
    chosen = next((item for item in found.formats if item.format == found.recommendation.format), None)
    if chosen is not None and chosen.speed is not None:
        parts.append(Text(f"\nmemory in {chosen.format}\n{chosen.speed.plan.render()}", style="dim"))
    if chosen is not None and chosen.packing_s is not None and chosen.pack_bytes > free_bytes:
        note = f"the disk of the packs has {format_size(free_bytes)} free; MOE_OFFLOAD_HOME names a folder on another"
        parts.append(Text(note, style="yellow"))
    return Group(*parts)


def _model_lines(found: "Forecast") -> list[str]:
    model = found.model
    size = f"{model['weights'] / 1e9:.1f} billion weights, " if model["weights"] else ""
    lines = [
        f"{model['name']} ({model['type']}): {size}{model['layers']} layers of {model['experts']} experts, "
        f"{model['top_k']} a token",
    ]
    download = found.machine.download
    if model["is_remote"] and model["checkpoint_bytes"]:
        time = f", {about(model['checkpoint_bytes'] / download.per_s)}" if download else ""
        lines.append(f"{format_size(model['checkpoint_bytes'])} to download{time}")
    lines.append(f"hits from {found.routing}; prompts of {found.prompt_tokens} tokens, context {found.context_tokens}")
    return lines


def _machine_lines(machine: "Machine") -> list[str]:
    vram = "" if machine.vram_bytes is None else f"{format_size(machine.vram_bytes)} of VRAM, "
    if machine.gpus:
        each = ", ".join(f"{format_size(size_bytes)} on GPU {index}" for index, size_bytes in machine.gpus)
        vram = f"{each}; "
    rates: list[tuple[str, Rate | None]] = [
        ("RAM" if machine.device == "cpu" else "VRAM", machine.memory),
        ("PCIe", machine.copy),
        ("disk", machine.disk),
    ]
    texts = [f"{name} {_rate(rate)}" for name, rate in rates if rate is not None]
    lines = [f"{vram}{format_size(machine.ram_bytes)} of RAM; {', '.join(texts)}"]
    if machine.device == "cuda":
        if machine.gpus:
            lines.append("a token passes one GPU after the other: several hold more, they do not add up in speed")
        lines.append(
            "kept and hits: in VRAM and beside it in RAM. The CUDA path has not run on a GPU yet: rough guesses"
        )
    return lines


def _rate(rate: "Rate") -> str:
    return f"{rate.per_s / 1e9:.1f} GB/s ({rate.origin})"


def _cells(item: "FormatForecast") -> tuple[str, ...]:
    packing = "" if item.packing_s is None else about(item.packing_s.mid)
    head = (item.format, item.dense_format, format_size(item.pack_bytes), packing)
    if item.speed is None:
        return (*head, "-", "", "", "", "")
    plan, speed = item.speed.plan, item.speed
    place = f"{plan.resident_share:.0%}"
    hits = percent(speed.hit_ratio)
    if plan.device == "cuda":
        place, hits = f"{place} + {plan.host_share:.0%}", f"{hits} / {percent(speed.reach)}"
    return (
        *head,
        place,
        hits,
        span(speed.decode.tokens_per_s),
        time_span(speed.time_to_first_token_s),
        _LIMITS[speed.decode.bound_by],
    )


def span(band: "Band") -> str:
    """ "4.1-6.9", in two digits."""
    return f"{_two_digits(band.low)}-{_two_digits(band.high)}"


def time_span(band: "Band") -> str:
    """ "53-86 s", "2.6-4.1 min", "1.2-3.0 h"."""
    size, unit = (1, "s") if band.high < 120 else (60, "min") if band.high < 7200 else (3600, "h")
    return f"{_two_digits(band.low / size)}-{_two_digits(band.high / size)} {unit}"


def about(seconds: float) -> str:
    """ "95 s", "4.6 min"."""
    size, unit = (1, "s") if seconds < 120 else (60, "min") if seconds < 7200 else (3600, "h")
    return f"{_two_digits(seconds / size)} {unit}"


def percent(band: "Band") -> str:
    """ "41-49%"."""
    low, high = round(100 * band.low), round(100 * band.high)
    return f"{low}%" if low == high else f"{low}-{high}%"


def _two_digits(number: float) -> str:
    return f"{number:.0f}" if number >= 9.95 else f"{number:.1f}" if number >= 0.995 else f"{number:.2f}"


def verdict_view(verdict: "Verdict") -> RenderableType:
    """Every run of a report beside its band."""
    parts: list[RenderableType] = [Text(verdict.heading)]
    for check in verdict.checks:
        grid = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=False)
        for _ in range(4):
            grid.add_column(no_wrap=True)
        for line in check.lines:
            mark = Text("in the band" if line.inside else line.side, style="green" if line.inside else "red")
            grid.add_row(f"  {line.what}", line.measured_text, f"foretold {line.band_text}", mark)
        parts += [Text(check.name), grid]
    return Group(*parts, Text(verdict.sentence, style="bold"))
