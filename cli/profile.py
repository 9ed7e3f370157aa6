"""``moe-offload profile``: where the bytes and the time of a run went, and what to change first."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moe_offload.cli.options import MODEL, given, load_options
from moe_offload.cli.param_types import RateType
from moe_offload.cli.user_text import piped_text
from moe_offload.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from moe_offload.offload.profiling.prompts import Prompt
    from moe_offload.offload.profiling.report import ProfileReport
    from moe_offload.offload.profiling.run_facts import Rates

_FILE = click.Path(dir_okay=False, path_type=Path)
_FILE_OR_DASH = click.Path(dir_okay=False, allow_dash=True, path_type=Path)

_OPTION_NAMES = {"json_path": "json", "context_tokens": "context"}


@click.command()
@click.argument("model", type=MODEL, required=False)
@click.option(
    "--prompts",
    type=_FILE_OR_DASH,
    metavar="FILE|-",
    help="Prompts to run, parted by lines of ---; -: what is piped in.  [default: English, code, maths, German, chat]",
)
@click.option("--tokens", type=click.IntRange(min=2), default=64, show_default=True, help="New tokens of each answer.")
@click.option("--from-trace", type=_FILE, metavar="TRACE", help="Analyse a trace that was recorded; runs nothing.")
@click.option(
    "--compare",
    type=_FILE,
    nargs=2,
    metavar="A.json B.json",
    help="Show what differs between two reports; runs nothing.",
)
@click.option("--html", type=_FILE, default=Path("profile.html"), show_default=True, help="The page to write.")
@click.option("--no-html", is_flag=True, help="Write no page.")
@click.option(
    "--json",
    "json_path",
    type=_FILE_OR_DASH,
    metavar="FILE|-",
    help="Write all figures (docs/profile-report.md) to a file, or to the output instead of the report.",
)
@click.option("--perfetto", type=_FILE, metavar="FILE", help="Write the times for ui.perfetto.dev or chrome://tracing.")
@click.option("--trace", type=_FILE, metavar="FILE", help="Keep the trace of the run, for replay and learn.")
@click.option("--memory", type=RateType(), help="How fast memory is read, for the bound.  [default: measured]")
@click.option("--disk", type=RateType(), help="How fast the disk is read, like 3.5GB/s.  [default: measured]")
@click.option("--pcie", type=RateType(), help="How fast RAM is copied to the GPU.  [default: measured]")
@load_options
def profile(
    model: str | None,
    prompts: Path | None,
    tokens: int,
    from_trace: Path | None,
    compare: tuple[Path, Path] | None,
    html: Path,
    no_html: bool,
    json_path: Path | None,
    perfetto: Path | None,
    trace: Path | None,
    memory: float | None,
    disk: float | None,
    pcie: float | None,
    **load: Any,
) -> None:
    """Show where the bytes and the time of a run went, and what would help most.

    Runs prompts on MODEL (the built-in demo without one), or reads a trace. Writes a report here, a page that needs no
    network, and JSON.

    \b
    moe-offload profile MODEL --ram 12GiB --html before.html --json before.json
    moe-offload profile --from-trace run.npz --disk 3.5GB/s
    moe-offload profile --compare before.json after.json
    """
    if sum(source is not None for source in (model, from_trace, compare)) > 1:
        raise click.UsageError("Name a MODEL, or give --from-trace or --compare: one of them.")
    _refuse_idle_options(load, from_trace is not None, compare is not None)

    from moe_offload.cli.consoles import notes_console

    notes = notes_console()
    if compare is not None:
        _compare(*compare)
        return

    from moe_offload.offload.profiling.run_facts import Rates

    rates = Rates(memory, disk, pcie, None)
    if from_trace is not None:
        report = _analysed(from_trace, perfetto, rates)
    else:
        chosen = None if prompts is None else _prompts(prompts)
        report = _run(model, given(load), notes, chosen, tokens, rates, trace=trace, perfetto=perfetto)
    if not no_html:
        report.save_html(html)
    if json_path is not None and str(json_path) != "-":
        json_path.write_text(report.to_json(), encoding="utf-8")
    if str(json_path) == "-":
        click.echo(report.to_json(), nl=False)
    else:
        from moe_offload.offload.profiling.text import terminal_report

        notes_console(stderr=False).print(terminal_report(report))
    written = [path for path in (None if no_html else html, json_path, perfetto, trace) if path and str(path) != "-"]
    if written:
        notes.print(f"written: {', '.join(map(str, written))}", style="dim")


def _refuse_idle_options(load: dict[str, Any], from_trace: bool, compare: bool) -> None:
    """Options that would change nothing are a mistake."""
    idle: list[str] = []
    if from_trace or compare:
        idle += ["prompts", "tokens", "trace", *load]
    if compare:
        idle += ["html", "no_html", "json_path", "perfetto", "memory", "disk", "pcie"]
    wrong = list(given(dict.fromkeys(idle)))
    if wrong:
        name = _OPTION_NAMES.get(wrong[0], wrong[0].replace("_", "-"))
        raise click.UsageError(f"--{name} has no use with {'--compare' if compare else '--from-trace'}.")


def _run(
    model: str | None,
    load: dict[str, Any],
    notes: "Console",
    prompts: "tuple[Prompt, ...] | None",
    tokens: int,
    rates: "Rates",
    *,
    trace: Path | None,
    perfetto: Path | None,
) -> "ProfileReport":
    from moe_offload.cli.opening import open_model
    from moe_offload.cli.ranks import refuse_ranks

    refuse_ranks("a profile is")
    with open_model(model, load, notes) as opened, notes.status("Starting") as status:

        def tell(prompt: "Prompt", number: int, count: int) -> None:
            status.update(f"{prompt.name} ({number} of {count}), {tokens} tokens")
            if not notes.is_terminal:
                notes.print(f"{prompt.name} ({number} of {count})", style="dim")

        return opened.model.profile(
            prompts, max_new_tokens=tokens, rates=rates, trace=trace, perfetto=perfetto, on_prompt=tell
        )


def _analysed(path: Path, perfetto: Path | None, rates: "Rates") -> "ProfileReport":
    from moe_offload.cache import read_trace
    from moe_offload.offload.profiling.analyse import analyse

    trace = read_trace(path)
    if perfetto is not None:
        from moe_offload.offload.tracing.chrome_trace import write_chrome_trace

        write_chrome_trace(perfetto, trace)
    return analyse(trace, trace_file=path.name, rates=rates)


def _compare(a: Path, b: Path) -> None:
    from moe_offload.cli.consoles import notes_console
    from moe_offload.offload.profiling.comparison import compare
    from moe_offload.offload.profiling.comparison_text import terminal_comparison
    from moe_offload.offload.profiling.report import ProfileReport

    comparison = compare(ProfileReport.load(a), ProfileReport.load(b))
    notes_console(stderr=False).print(terminal_comparison(comparison, str(a), str(b)))


def _prompts(path: Path) -> "tuple[Prompt, ...]":
    from moe_offload.offload.profiling.prompts import parse_prompts

    if str(path) == "-":
        return parse_prompts(piped_text())
    try:
        return parse_prompts(path.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
