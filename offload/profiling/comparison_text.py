"""A comparison on a terminal."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moe_offload.offload.profiling.comparison import CAVEAT, Change, Comparison, Setting


def terminal_comparison(comparison: Comparison, name_a: str, name_b: str) -> RenderableType:
    """What was set, what came out, and the caveat; ``name_a`` and ``name_b`` say which is which."""
    blocks: list[RenderableType] = [Text(f"a  {name_a}\nb  {name_b}", style="bold")]
    blocks += [Text(note, style="yellow") for note in comparison.notes]
    if comparison.settings:
        blocks += [Text("\nSet differently", style="bold"), _settings(comparison.settings)]
    else:
        blocks.append(Text("\nNothing was set differently."))
    blocks += [Text("\nWhat came out", style="bold"), _changes(comparison.figures)]
    if comparison.layers:
        blocks += [Text("\nHits of the layers that differ most", style="bold"), _changes(comparison.layers)]
    if comparison.step is not None:
        blocks.append(Text(f"\n{comparison.step}"))
    blocks.append(Text(CAVEAT if comparison.step is not None else f"\n{CAVEAT}", style="dim"))
    return Group(*blocks)


def _settings(settings: Sequence[Setting]) -> Table:
    grid = _grid("left", "left", "left")
    for setting in settings:
        grid.add_row(Text(f"  {setting.name}", "cyan"), Text(setting.a), Text(setting.b))
    return grid


def _changes(changes: Sequence[Change]) -> Table:
    grid = _grid("left", "right", "right", "right")
    for change in changes:
        if change.a is not None or change.b is not None:
            difference = "" if change.change is None else f"{change.change:+.1%}"
            grid.add_row(Text(f"  {change.name}", "cyan"), change.text_a, change.text_b, difference)
    return grid


def _grid(*columns: str) -> Table:
    grid = Table.grid(padding=(0, 3, 0, 0))
    for justify in columns:
        grid.add_column(justify=justify, overflow="fold")  # type: ignore[arg-type]
    return grid
