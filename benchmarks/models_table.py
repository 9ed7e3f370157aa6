"""Writes the forecasts in docs/models.md: well-known models on a few machines, by `moe-offload plan`. Takes a minute.

Shapes are those of offload/bench/presets.py, which says where each is from. Nothing is downloaded or measured.
"""

from dataclasses import dataclass
from pathlib import Path

from moe_offload.cli.plan_table import about, percent, span, time_span
from moe_offload.offload.bench.presets import HUB_IDS
from moe_offload.offload.forecast import Forecast, Machine, Rate, forecast, open_shape
from moe_offload.offload.planning.sizes import format_size

DOCUMENT = Path(__file__).parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- forecasts:begin -->", "<!-- forecasts:end -->"
GIB = 1 << 30
MODELS = (
    "olmoe-1b-7b",
    "gpt-oss-20b",
    "qwen3-30b-a3b",
    "qwen3.5-35b-a3b",
    "mixtral-8x7b",
    "gpt-oss-120b",
    "mixtral-8x22b",
    "qwen3-235b-a22b",
    "deepseek-v3",
    "kimi-k2",
    "switch-c-2048",
)
NOTES = {
    "deepseek-v3": "DeepSeek-V3 and R1",
    "kimi-k2": "Kimi-K2 (as a DeepSeek-V3)",
    "switch-c-2048": "Switch-C-2048",
}


@dataclass(frozen=True)
class Setup:
    """A machine, and in words what it stands for."""

    title: str
    machine: Machine


def _given(per_s: float) -> Rate:
    return Rate(per_s, "given")


def _setup(
    title: str,
    *,
    ram: int,
    memory: float,
    disk: float,
    matrix: float,
    vram: int | None = None,
    copy: float | None = None,
) -> Setup:
    return Setup(
        title,
        Machine(
            ram * GIB,
            None if vram is None else vram * GIB,
            _given(memory),
            _given(disk),
            None if copy is None else _given(copy),
            Rate(matrix, "assumed"),
            Rate(1e9, "assumed"),
        ),
    )


SETUPS = (
    _setup(
        "A laptop with 16 GB of RAM and no GPU: 13 GiB to use, RAM read at 50 GB/s, disk at 3.5 GB/s",
        ram=13, memory=50e9, disk=3.5e9, matrix=0.5e12,
    ),
    _setup(
        "A GPU with 8 GB and 32 GB of RAM: 7 and 28 GiB to use, VRAM 270 GB/s, PCIe 12 GB/s, disk 3.5 GB/s",
        ram=28, vram=7, memory=270e9, copy=12e9, disk=3.5e9, matrix=20e12,
    ),
    _setup(
        "A GPU with 24 GB and 64 GB of RAM: 22 and 58 GiB to use, VRAM 900 GB/s, PCIe 25 GB/s, disk 7 GB/s",
        ram=58, vram=22, memory=900e9, copy=25e9, disk=7e9, matrix=60e12,
    ),
)  # fmt: skip


def row(name: str, found: Forecast) -> str:
    """One model on one machine, in the format that the forecast recommends."""
    weights = f"{found.model['weights'] / 1e9:.0f}"
    title = NOTES.get(name, HUB_IDS[name].partition("/")[2])
    chosen = next((item for item in found.formats if item.format == found.recommendation.format), None)
    if chosen is None or chosen.speed is None:
        least = min(
            (item.refusal.needed_bytes, item.format, item.dense_format) for item in found.formats if item.refusal
        )
        needed = f"{least[1]}, dense {least[2]}, from {format_size(least[0])}"
        return f"| {title} | {weights} | does not fit; {needed} | | | | | |"
    speed, plan = chosen.speed, chosen.speed.plan
    kept, hits = f"{plan.resident_share:.0%}", percent(speed.hit_ratio)
    if plan.device == "cuda":
        kept, hits = f"{kept} + {plan.host_share:.0%}", f"{hits}, {percent(speed.reach)}"
    dense = "" if chosen.dense_format == "source" else f", dense {chosen.dense_format}"
    packing = about(chosen.packing_s.mid) if chosen.packing_s else ""
    return (
        f"| {title} | {weights} | {chosen.format}{dense} | {format_size(chosen.pack_bytes)} ({packing}) | {kept} "
        f"| {hits} | {span(speed.decode.tokens_per_s)} | {time_span(speed.time_to_first_token_s)} |"
    )


def tables() -> str:
    """Every machine's table."""
    shapes = {name: open_shape(name) for name in MODELS}
    parts = []
    for setup in SETUPS:
        rows = [row(name, forecast(shape, setup.machine)) for name, shape in shapes.items()]
        parts.append(
            "\n".join(
                [
                    f"{setup.title}.",
                    "",
                    "| model | billion weights | format | pack (packing) | kept | hits | tok/s | first token |",
                    "| --- | --- | --- | --- | --- | --- | --- | --- |",
                    *rows,
                ]
            )
        )
    return "\n\n".join(parts)


def main() -> None:
    """Put the tables between their markers."""
    page = DOCUMENT.read_text()
    begin, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    DOCUMENT.write_text(f"{page[:begin]}\n{tables()}\n{page[end:]}")


if __name__ == "__main__":
    main()
