"""What ``moe-offload bench`` shows: a line for every run as it ends, and the table at the end."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moe_offload.offload.bench.report import BenchReport, Row, RunFigures
from moe_offload.offload.bench.settings import MODEL_ROUTING, Setting
from moe_offload.offload.planning.sizes import format_size


def setting_name(setting: Setting) -> str:
    """The setting in a few words: ``4GiB, decay, prefetch auto``."""
    budget = f"{setting.resident:.0%} resident" if setting.resident is not None else str(setting.ram)
    return f"{budget}, {setting.policy}, prefetch {setting.prefetch}"


def one_run(setting: Setting, run: RunFigures) -> str:
    """A run as it ends."""
    return (
        f"{setting_name(setting)}: {run.tokens_per_s:.2f} tok/s, {run.hit_ratio:.0%} hits, "
        f"{format_size(round(run.bytes_read_per_token))} read a token"
    )


def table(report: BenchReport) -> RenderableType:
    """All rows, under what they were measured on and against."""
    rates, workload, pack = report.rates, report.workload, report.pack
    is_prefill = workload.kind == "prefill"
    what = f"prompts of {workload.prompt_tokens} tokens" if is_prefill else f"{workload.new_tokens} tokens decoded"
    measured = [f"memory {rates.memory_bytes_per_s / 1e9:.1f} GB/s", f"disk {rates.disk_bytes_per_s / 1e9:.2f} GB/s"]
    if rates.matrix_ops_per_s is not None:
        measured.append(f"matrix products {rates.matrix_ops_per_s / 1e9:.0f} G operations/s")
    machine = report.machine
    heading = Text(
        f"{pack.name}: {pack.layers} layers of {pack.experts} experts, {pack.top_k} a token, "
        f"{format_size(pack.expert_bytes)} each; {what}\n"
        f"{machine['cpu']}, {machine['threads']} threads, kernels {machine['kernels']}; measured beside: "
        + ", ".join(measured)
    )
    if not is_prefill:
        heading.append(f"\nrouting: {report.rows[0].best.routing}")
        if workload.routing != MODEL_ROUTING:
            heading.append(f"; lookahead foresees {workload.recall:.0%} of it")
    if not rates.direct:
        heading.append("\nO_DIRECT was refused: the disk rate may be that of the page cache")
    grid = Table()
    for title in ("setting", "resident", "RAM", "peak"):
        grid.add_column(title, justify="left" if title == "setting" else "right")
    columns = ["best tok/s", "median", "hits", "read a token", "stall", "bound tok/s", "by", "of bound"]
    for title in (["first token"] if is_prefill else []) + columns:
        grid.add_column(title, justify="right")
    for row in report.rows:
        grid.add_row(*_cells(report, row))
    return Group(heading, grid)


def _cells(report: BenchReport, row: Row) -> list[str]:
    best, limit = row.best, report.bound(row)
    first = [f"{best.time_to_first_token_s:.2f} s"] if report.workload.kind == "prefill" else []
    return [
        setting_name(row.setting),
        f"{best.resident_share:.0%}",
        format_size(best.ram_bytes),
        "-" if best.peak_bytes is None else format_size(best.peak_bytes),
        *first,
        f"{best.tokens_per_s:.2f}",
        f"{row.median_tokens_per_s:.2f}",
        f"{best.hit_ratio:.0%}",
        format_size(round(best.bytes_read_per_token)),
        f"{best.stall_s / best.elapsed_s:.0%}",
        f"{limit.tokens_per_s:.2f}",
        limit.by,
        f"{report.bound_share(row):.0%}",
    ]
