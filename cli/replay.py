"""``moe-offload replay``: what caches of other policies and sizes would have done with recorded routing."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moe_offload.cli import choices
from moe_offload.cli.param_types import RateType, SizeType, SlotsType

if TYPE_CHECKING:
    from moe_offload.cache import RoutingTrace
    from moe_offload.cache.replay_timing import Rates


@click.command()
@click.argument("traces", nargs=-1, required=True, type=click.Path(dir_okay=False, path_type=Path), metavar="TRACE...")
@click.option(
    "--policy",
    "policies",
    type=click.Choice(choices.replay_policies()),
    multiple=True,
    help="Which experts stay; again to compare.  [default: all]",
)
@click.option(
    "--slots",
    type=SlotsType(),
    multiple=True,
    metavar="N|SHARE",
    help="Slots of each layer, like 16 or 25%; again for another size.  [default: as in the run, else 25% and 50%]",
)
@click.option("--pool", is_flag=True, help="Also with as many slots in one pool of all layers.")
@click.option("--curve", is_flag=True, help="Show hits against size, from one token's experts to all of them.")
@click.option(
    "--counting",
    type=click.Choice(("run", "token")),
    default="run",
    show_default=True,
    help="As the runtime asks, a prompt at once; or every token by itself, as published figures count.",
)
@click.option("--disk", type=RateType(), help="Rate at which experts are read, like 3.5GB/s: adds seconds.")
@click.option("--pcie", type=RateType(), help="Rate at which they are copied to the GPU; the slower one counts.")
@click.option(
    "--layer-ms",
    type=click.FloatRange(min=0),
    help="What a layer computes for a token, half of it before its router.  [default: as recorded, else nothing]",
)
@click.option("--expert-size", type=SizeType(), help="Size of an expert, where the trace does not tell.")
@click.option(
    "--prefetch-recall",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of the misses that is foreseen one layer ahead, and fetched if the link has time.",
)
@click.option(
    "--prefetch-precision",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Share of what is fetched ahead that is asked for.",
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    metavar="FILE|-",
    help="Write all figures, of every layer, to a file, or to the output instead of the tables.",
)
def replay(
    traces: tuple[Path, ...],
    policies: tuple[str, ...],
    slots: tuple[int | float, ...],
    curve: bool,
    json_path: Path | None,
    **options: Any,
) -> None:
    """Tell from recorded routing what other caches would have done.

    A TRACE is an .npz file, made by --trace of chat, generate or bench, or by another program. The caches begin empty.
    Belady is the optimum, which knows the future; "gap closed" is the share of the way to it from LRU.

    \b
    moe-offload replay run.npz --slots 25% --slots 50%
    moe-offload replay run.npz --policy decay --slots 12 --disk 3.5GB/s --prefetch-recall 0.8
    """
    from moe_offload.cache import read_trace
    from moe_offload.cli.consoles import notes_console
    from moe_offload.cli.replay_figures import TraceFigures, figures

    policies = policies or choices.replay_policies()
    found: list[TraceFigures] = []
    expert_bytes = _expert_bytes(options["expert_size"])
    for path in traces:
        trace = read_trace(path)
        rates = _rates(trace, options)
        if rates is not None and trace.expert_bytes is None and expert_bytes is None:
            raise click.UsageError(f"{path} does not tell how large its experts are: add --expert-size, like 6MiB.")
        found.append(
            figures(
                path.stem,
                trace,
                policies,
                slots,
                pool=options["pool"],
                with_curves=curve,
                counting=options["counting"],
                rates=rates,
                recall=options["prefetch_recall"],
                precision=options["prefetch_precision"],
                expert_bytes=expert_bytes,
            )
        )
    if json_path is not None:
        text = json.dumps({"version": 1, "traces": [each.to_dict() for each in found]}, indent=1) + "\n"
        if str(json_path) == "-":
            click.echo(text, nl=False)
            return
        json_path.write_text(text)
    from moe_offload.cli.replay_table import tables

    notes_console(stderr=False).print(tables(found))


def _rates(trace: "RoutingTrace", options: dict[str, Any]) -> "Rates | None":
    from moe_offload.cache.replay_timing import Rates, measured_rates

    links = [rate for rate in (options["disk"], options["pcie"]) if rate is not None]
    if not links:
        for name in ("prefetch_recall", "prefetch_precision", "layer_ms"):
            if click.get_current_context().get_parameter_source(name) != click.core.ParameterSource.DEFAULT:
                raise click.UsageError(f"--{name.replace('_', '-')} needs a rate: give --disk, --pcie or both.")
        return None
    if options["layer_ms"] is None:
        return measured_rates(trace, min(links))
    half_s = options["layer_ms"] / 2000
    return Rates(min(links), before_s=half_s, experts_s=half_s)


def _expert_bytes(size: str | None) -> int | None:
    from moe_offload.offload.planning.sizes import parse_size

    return None if size is None else parse_size(size, total_bytes=0, free_bytes=0)
