"""A report on a terminal: everything that fits into 80 columns."""

import io
from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from moe_offload.offload.profiling import figures
from moe_offload.offload.profiling.blocks import bar, heat, sparkline
from moe_offload.offload.profiling.report import ProfileReport
from moe_offload.offload.profiling.sections import LayerFigures, Link, TimeSplit

_WIDTH, _BAR, _STRIP = 80, 30, 64
_MOST_LAYERS = 32
_PARTS = (("dense", "dense_s"), ("router", "router_s"), ("wait", "wait_s"), ("experts", "experts_s"),
          ("other", "other_s"))  # fmt: skip


def as_text(report: ProfileReport, width: int = _WIDTH) -> str:
    """Plain text without colours."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(terminal_report(report))
    file = console.file
    assert isinstance(file, io.StringIO)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def terminal_report(report: ProfileReport) -> RenderableType:
    """All sections that the report has, and what it lacks."""
    blocks: list[RenderableType] = [_title(report), _header(report)]
    for title, section in (
        ("Time of a decode step", _time(report)),
        ("What a change would bring", _levers(report)),
        ("Link to the GPU", _link(report)),
        ("Step by step", _steps(report)),
        ("Layers, in decode", _layers(report)),
        ("Hits in decode by cache size, without prefetching", _curves(report)),
        ("Prediction", _prediction(report)),
        ("Experts", _experts(report)),
    ):
        if section is not None:
            blocks += [Text(f"\n{title}", style="bold"), section]
    if report.missing:
        lines = [f"{item.section}: {item.reason}" for item in report.missing]
        blocks.append(Text("\nNot in this report\n  " + "\n  ".join(lines), style="dim"))
    return Group(*blocks)


def _rows(rows: Iterator[tuple[str, str]], style: str = "cyan") -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style=style, no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in rows:
        grid.add_row(Text(f"  {label}"), Text(value))
    return grid


def _title(report: ProfileReport) -> Text:
    run = report.run
    layers = len(run.num_experts)
    parts = [f"{layers} layers of {max(run.num_experts)} experts, {run.top_k} a token"]
    if run.num_slots is not None:
        parts.append(f"{sum(run.num_slots) / layers:.3g} slots a layer")
    parts += [text for text in (run.format, run.device, run.policy) if text]
    if run.prefetch:
        parts.append(f"prefetch {run.prefetch}")
    return Text(run.model, style="bold").append("\n" + ", ".join(parts), style="not bold dim")


def _header(report: ProfileReport) -> RenderableType:
    head = report.header

    def rows() -> Iterator[tuple[str, str]]:
        if head.tokens_per_s is not None:
            yield "speed", f"{figures.speed(head.tokens_per_s)} (median step {figures.seconds(head.median_step_s)})"
        if head.time_to_first_token_s is not None:
            yield "first", f"token after {figures.seconds(head.time_to_first_token_s)}"
        ratios = ((head.hit_ratio_decode, "decode"), (head.hit_ratio_prefill, "prefill"))
        if hits := [f"{ratio:.0%} in {phase}" for ratio, phase in ratios if ratio is not None]:
            yield "hits", ", ".join(hits)
        moved = ((head.disk_bytes_per_token, "from disk"), (head.pcie_bytes_per_token, "over PCIe"))
        if moves := [f"{figures.size(amount)} {way}" for amount, way in moved if amount is not None]:
            yield "moved", ", ".join(moves) + " for a token"
        if head.stall_share is not None:
            yield "stalled", f"{head.stall_share:.1%} of the decoding time"
        if head.bound is not None:
            yield (
                "bound",
                f"{figures.speed(head.bound.tokens_per_s)} by {head.bound.by}; {head.bound.share:.0%} reached",
            )
        yield "answers", head.exactness.text
        if report.levers is not None:
            yield "next", report.levers.next

    return _rows(rows())


def _time(report: ProfileReport) -> RenderableType | None:
    split = report.timing.decode if report.timing else None
    if report.timing is None or split is None:
        return None
    timing = report.timing

    def rows(split: TimeSplit) -> Iterator[tuple[str, str]]:
        for label, name in _PARTS:
            share = getattr(split, name) / split.clock_s
            each = figures.seconds(getattr(split, name) / split.steps)
            yield f"{label:<8}", f"{share:>4.0%} {each:>8}  {bar(share, _BAR)}"
        percentiles = " / ".join(
            figures.seconds(value)
            for value in (timing.step_p10_s, timing.step_p50_s, timing.step_p90_s, timing.step_p99_s)
        )
        yield "a step", f"{percentiles} at 10 / 50 / 90 / 99% of {split.steps} steps"
        yield "sum", f"{split.accounted_share:.1%} of the wall clock ({figures.seconds(split.clock_s)})"

    return _rows(rows(split))


def _link(report: ProfileReport) -> RenderableType | None:
    found = report.link
    if found is None:
        return None

    def rows(link: Link) -> Iterator[tuple[str, str]]:
        for name, phase in (("decode", link.decode), ("prefill", link.prefill)):
            if phase is not None:
                yield (
                    name,
                    f"{figures.percent(phase.use)} used, {figures.percent(phase.busy_share)} of the time busy; "
                    f"{figures.size(phase.demand_bytes)} on demand, {figures.size(phase.ahead_bytes)} ahead",
                )
        if link.step_use_p50 is not None:
            shares = (link.step_use_p10, link.step_use_p50, link.step_use_p90)
            yield "a step", f"{' / '.join(map(figures.percent, shares))} used at 10 / 50 / 90% of decode steps"
        for gpu in link.gpus:
            yield (
                f"GPU {gpu.gpu}",
                f"at most {figures.rate(gpu.peak_bytes_per_s)}, busy {figures.seconds(gpu.busy_s)} with "
                f"{figures.size(gpu.demand_bytes + gpu.ahead_bytes)}",
            )

    return _rows(rows(found))


def _levers(report: ProfileReport) -> RenderableType | None:
    if report.levers is None or not report.levers.levers:
        return None
    grid = Table.grid(padding=(0, 2, 0, 0))
    for justify in ("right", "right", "left", "left"):
        grid.add_column(justify=justify, overflow="fold")
    for lever in report.levers.levers:
        grid.add_row(
            f"  {lever.gain:+.0%}", figures.speed(lever.tokens_per_s), lever.change, Text(lever.option or "", "cyan")
        )
    return grid


def _steps(report: ProfileReport) -> RenderableType | None:
    steps = report.steps
    chosen = [index for index, phase in enumerate(steps.phase) if phase == "decode"]

    def rows() -> Iterator[tuple[str, str]]:
        series = (
            ("stall", steps.wait_s),
            ("misses", steps.misses),
            ("step", steps.wall_s),
            ("link", steps.link_busy_s),
        )
        for label, values in series:
            if values is not None:
                yield label, sparkline([values[index] / steps.num_steps[index] for index in chosen], _STRIP)

    return _rows(rows()) if chosen and (steps.misses is not None or steps.wall_s is not None) else None


def _layers(report: ProfileReport) -> RenderableType:
    shown = list(report.layers)
    if len(shown) > _MOST_LAYERS:
        worst = sorted(shown, key=lambda layer: (not layer.starving, layer.hit_ratio or 0.0, -layer.requests))
        shown = sorted(worst[:_MOST_LAYERS], key=lambda layer: layer.layer)
    columns = {"  layer": "right", "uses, expert by expert": "left"}
    if report.steps.hits is not None:
        columns |= {"hits": "right", "": "left"}
    if report.timing is not None:
        columns |= {"wait": "right"}
    grid = Table.grid(padding=(0, 2, 0, 0))
    for justify in columns.values():
        grid.add_column(justify=justify, no_wrap=True)  # type: ignore[arg-type]
    grid.add_row(*(Text(title, "dim") for title in columns))
    for layer in shown:
        cells = _layer_cells(report, layer)
        grid.add_row(*(cells[title] for title in columns))
    if len(shown) == len(report.layers):
        return grid
    rest = len(report.layers) - len(shown)
    return Group(grid, Text(f"  and {rest} more, which the page and the JSON have", "dim"))


def _layer_cells(report: ProfileReport, layer: LayerFigures) -> dict[str, str | Text]:
    uses = report.usage.decode_uses if report.run.decode_tokens else report.usage.prefill_uses
    picture = f"{bar(layer.hit_ratio or 0.0, 12):<12}"
    return {
        "  layer": f"  {layer.layer}",
        "uses, expert by expert": heat([float(count) for count in uses[layer.layer]], 32),
        "hits": figures.percent(layer.hit_ratio),
        "": Text(picture).append(" starving", "red") if layer.starving else picture,
        "wait": figures.seconds(layer.wait_s),
    }


def _curves(report: ProfileReport) -> RenderableType | None:
    if report.curves is None or not report.curves.curves:
        return None
    curves = report.curves
    last = len(curves.curves[0].slots) - 1
    columns = sorted({round(index * last / 7) for index in range(8)})
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True)
    for _ in columns:
        grid.add_column(justify="right")
    grid.add_row(
        Text("  of all experts", "dim"),
        *(Text(f"{curves.curves[0].resident_share[column]:.0%}", "dim") for column in columns),
    )
    for curve in curves.curves:
        grid.add_row(f"  {curve.label}", *(f"{curve.hit_ratio[column]:.1%}" for column in columns))
    notes = []
    if curves.today is not None:
        notes.append(f"today {curves.today.resident_share:.0%}: {curves.today.hit_ratio:.1%}")
    if curves.measured_resident_ratio is not None and curves.measured_hit_ratio is not None:
        notes.append(f"measured {curves.measured_resident_ratio:.1%}, prefetched {curves.measured_hit_ratio:.1%}")
    if curves.knee is not None:
        notes.append(f"knee {curves.knee.resident_share:.0%}: {curves.knee.hit_ratio:.1%} ({curves.knee_policy})")
    return Group(grid, Text("  " + "; ".join(notes), "dim")) if notes else grid


def _prediction(report: ProfileReport) -> RenderableType | None:
    found = report.prediction
    if found is None:
        return None

    def rows() -> Iterator[tuple[str, str]]:
        for index, distance in enumerate(found.distances):
            layers = "layer" if distance == 1 else "layers"
            yield (
                f"{distance} {layers} ahead",
                f"recall {figures.percent(found.recall[index])}, precision {figures.percent(found.precision[index])}",
            )
        if found.used_bytes is not None:
            yield (
                "read ahead",
                f"{figures.size(found.used_bytes)} used in time, {figures.size(found.late_bytes)} late, "
                f"{figures.size(found.wasted_bytes)} in vain; {figures.size(found.demand_bytes)} on demand",
            )
        if found.hidden_s is not None:
            yield "time", f"{figures.seconds(found.hidden_s)} hidden, {figures.seconds(found.waited_s)} waited"

    return _rows(rows())


def _experts(report: ProfileReport) -> RenderableType:
    experts = report.experts

    def span(values: tuple[float | None, ...]) -> str:
        known = [value for value in values if value is not None]
        return f"{min(known):.0%} to {max(known):.0%}" if known else figures.NONE

    def rows() -> Iterator[tuple[str, str]]:
        evenness = [load.entropy_bits / load.max_entropy_bits for load in experts.load if load.max_entropy_bits]
        busiest = max(experts.load, key=lambda load: load.largest_share * 2**load.max_entropy_bits)
        yield (
            "load",
            f"entropy {span(tuple(evenness))} of even; busiest: expert {busiest.busiest_expert} of layer "
            f"{busiest.layer}, {busiest.largest_share:.0%} of its layer",
        )
        again = experts.repetition
        if again is not None:
            random = f"by chance {again.random_first[0]:.0%} and {again.random_any[0]:.0%}"
            yield "repeats", f"first choice {span(again.first)}, any choice {span(again.any)} ({random})"
        for published in experts.published:
            yield (
                f"{published.model}",
                f"layer {published.layer}: first {published.first_low:.0%} to {published.first_high:.0%}, "
                f"any {published.any_low:.0%} to {published.any_high:.0%} (published)",
            )
        if experts.coactivation is not None:
            yield (
                "next layer",
                f"a table foresees {span(experts.coactivation.recall)}, load alone "
                f"{span(experts.coactivation.base_recall)}",
            )

    return _rows(rows())
