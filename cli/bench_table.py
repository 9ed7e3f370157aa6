"""What ``moe-offload bench`` shows: a line for every run as it ends, and the table at the end."""

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moe_offload.cli.report import format_seconds
from moe_offload.offload.bench.report import BenchReport, Row, RunFigures
from moe_offload.offload.bench.settings import MODEL_ROUTING, Setting
from moe_offload.offload.planning.sizes import format_size


def one_run(setting: Setting, run: RunFigures) -> str:
    """A run as it ends."""
    budget = f"{setting.resident:.0%} resident" if setting.resident is not None else str(setting.ram)
    peak = "" if run.peak_bytes is None else f", {format_size(run.peak_bytes)} held at most"
    return (
        f"{budget}, {setting.policy}, prefetch {setting.prefetch}: {run.tokens_per_s:.2f} tok/s, "
        f"{run.hit_ratio:.0%} hits, {format_size(round(run.bytes_read_per_token))} read a token{peak}"
    )


def table(report: BenchReport) -> RenderableType:
    """All rows, under what they were measured on and against. What all have in common stands above, not in columns."""
    settings = [row.setting for row in report.rows]
    columns = [
        ("RAM", [format_size(row.best.ram_bytes) for row in report.rows]),
        ("slots", [f"{row.best.resident_share:.0%}" for row in report.rows]),
    ]
    common = []
    for title, values in (
        ("policy", [setting.policy for setting in settings]),
        ("prefetch", [str(setting.prefetch) for setting in settings]),
    ):
        if len(set(values)) > 1:
            columns.append((title, values))
        else:
            common.append(f"{title} {values[0]}")
    columns += _figures(report)
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for title, _ in columns:
        grid.add_column(title, justify="right", no_wrap=True)
    for cells in zip(*(values for _, values in columns), strict=True):
        grid.add_row(*cells)
    return Group(_heading(report, common), grid)


def _figures(report: BenchReport) -> list[tuple[str, list[str]]]:
    def column(title: str, cell: object) -> tuple[str, list[str]]:
        assert callable(cell)
        return title, [str(cell(row)) for row in report.rows]

    def bound(row: Row) -> str:
        limit = report.bound(row)
        return f"{limit.tokens_per_s:.2f} {limit.by}"

    columns = [column("tok/s", lambda row: f"{row.best.tokens_per_s:.2f}")]
    if max(len(row.runs) for row in report.rows) > 1:
        columns.append(column("median", lambda row: f"{row.median_tokens_per_s:.2f}"))
    if report.workload.kind == "prefill":
        columns.append(column("first token", lambda row: format_seconds(row.best.time_to_first_token_s)))
    return [
        *columns,
        column("hits", lambda row: f"{row.best.hit_ratio:.0%}"),
        column("read/token", lambda row: format_size(round(row.best.bytes_read_per_token))),
        column("stall", lambda row: f"{row.best.stall_s / row.best.elapsed_s:.0%}"),
        column("bound", bound),
        column("of it", lambda row: f"{report.bound_share(row):.0%}"),
    ]


def _heading(report: BenchReport, common: list[str]) -> Text:
    rates, workload, pack, machine = report.rates, report.workload, report.pack, report.machine
    is_prefill = workload.kind == "prefill"
    measured = [f"memory {rates.memory_bytes_per_s / 1e9:.1f} GB/s", f"disk {rates.disk_bytes_per_s / 1e9:.2f} GB/s"]
    if rates.matrix_ops_per_s is not None:
        measured.append(f"matrix products {rates.matrix_ops_per_s / 1e9:.0f} G operations/s")
    lines = [
        f"{pack.name}: {pack.layers} layers of {pack.experts} experts, {pack.top_k} a token, "
        f"{format_size(pack.expert_bytes)} each",
        f"{machine['threads']} threads, kernels {machine['kernels']}; measured beside: {', '.join(measured)}",
    ]
    if not rates.direct:
        lines.append("O_DIRECT was refused: the disk rate may be that of the page cache")
    if is_prefill:
        lines.append(f"prompts of {workload.prompt_tokens} tokens")
    else:
        foreseen = "" if workload.routing == MODEL_ROUTING else f", foreseen by {workload.recall:.0%}"
        lines.append(f"{workload.new_tokens} tokens decoded; routing {report.rows[0].best.routing}{foreseen}")
    lines[-1] += f"; {', '.join(common)}" if common else ""
    return Text("\n".join(lines))
