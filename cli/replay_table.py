"""What ``moe-offload replay`` shows: a table for each trace, curves, and the mean over all."""

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moe_offload.cache.replay_events import left_out
from moe_offload.cache.replay_timing import SimulatedTime
from moe_offload.cli.replay_figures import TraceFigures, mean_gap_closed
from moe_offload.offload.planning.sizes import format_size


def tables(found: Sequence[TraceFigures]) -> RenderableType:
    """All traces, one below the other."""
    parts: list[RenderableType] = []
    for each in found:
        parts += [_heading(each), _rows(each)]
        if each.curves:
            parts.append(_curves(each))
    means = mean_gap_closed(found)
    if len(found) > 1 and means:
        told = ", ".join(f"{policy} {share:.2f}" for policy, share in means.items())
        parts.append(Text(f"Share of the gap from LRU to Belady that is closed, on average: {told}"))
    return Group(*parts)


def _heading(each: TraceFigures) -> Text:
    trace = each.trace
    sequences = 1 if trace.sequence is None else len(set(trace.sequence.tolist()))
    lines = [
        f"{each.name}: {trace.num_tokens} tokens of {sequences} {'text' if sequences == 1 else 'texts'}, "
        f"{trace.num_layers} layers of {each.num_experts} experts, {trace.top_k} a token"
    ]
    if each.rates is not None and each.lookahead is not None:
        ahead = each.lookahead
        lines.append(
            f"experts come at {each.rates.link_bytes_per_s / 1e9:.2f} GB/s, "
            f"{ahead.recall:.0%} of the missing foreseen one layer ahead"
            + (f", {1 - ahead.precision:.0%} of what is fetched ahead in vain" if ahead.precision < 1 else "")
        )
    others = left_out(trace)
    if others:
        named = ", ".join(kind.name.lower().replace("_", " ") for kind in others)
        lines.append(
            f"the run's cache was also told of other things ({named}), which are left out: its own counts differ"
        )
    return Text("\n".join(lines))


def _rows(each: TraceFigures) -> Table:
    rows = each.rows
    columns = [
        ("policy", [row.result.policy for row in rows]),
        ("slots", [_slots(each, row.result.num_slots, row.result.pool_slots) for row in rows]),
        ("hits", [f"{row.counts.hit_ratio:.1%}" for row in rows]),
    ]
    if rows[0].phase == "decode" and rows[0].result.stats.prefill.requests:
        columns.append(("prompt hits", [f"{row.result.stats.prefill.hit_ratio:.1%}" for row in rows]))
    if any(row.counts.bypassed for row in rows):
        columns.append(("no slot", [f"{row.counts.bypassed / max(1, row.counts.requests):.1%}" for row in rows]))
    if rows[0].result.bytes_per_token is None:
        columns.append(("fetched/token", [f"{row.result.fetched_per_token:.1f}" for row in rows]))
    else:
        columns.append(("bytes/token", [format_size(round(row.result.bytes_per_token or 0)) for row in rows]))
    if each.rates is not None:
        columns.append(("ms/token", [f"{1000 * (row.result.seconds_per_token or 0):.1f}" for row in rows]))
        columns.append(("waiting", [_waiting(row.result.time) for row in rows]))
    columns.append(("gap closed", ["-" if row.gap_closed is None else f"{row.gap_closed:.2f}" for row in rows]))
    return _grid(columns)


def _curves(each: TraceFigures) -> Table:
    """A line for every size; the knee of each curve is marked."""
    sizes = each.curves[0].sizes
    knees = [found.knee() for found in each.curves]
    columns = [("slots", [f"{size} ({size / each.num_experts:.0%})" for size in sizes])]
    for found, knee in zip(each.curves, knees, strict=True):
        cells = [
            f"{'knee ' if size == knee else ''}{ratio:.1%}"
            for size, ratio in zip(sizes, found.hit_ratio(), strict=True)
        ]
        columns.append((found.policy, cells))
    return _grid(columns)


def _grid(columns: Sequence[tuple[str, Sequence[str]]]) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for title, _ in columns:
        grid.add_column(title, justify="left" if title == "policy" else "right", no_wrap=True)
    for cells in zip(*(values for _, values in columns), strict=True):
        grid.add_row(*cells)
    return grid


def _slots(each: TraceFigures, num_slots: Sequence[int], pool_slots: int | None) -> str:
    if pool_slots is not None:
        return f"{pool_slots} in a pool"
    least, most = min(num_slots), max(num_slots)
    if least != most:
        return f"{least} to {most}"
    return f"{most} ({most / each.num_experts:.0%})"


def _waiting(time: SimulatedTime | None) -> str:
    if time is None or not time.decode_s:
        return "-"
    return f"{time.decode_wait_s / time.decode_s:.0%}"
