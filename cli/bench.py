"""``moe-offload bench``: how fast a model decodes under a budget, beside what the machine allows."""

import json
from pathlib import Path
from typing import Any

import click

from moe_offload.cli import choices
from moe_offload.cli.param_types import FormatType, PrefetchType, SharesType, SizeType
from moe_offload.errors import ConfigError


@click.command()
@click.argument("pack", required=False, type=click.Path(path_type=Path), metavar="[PACK_OR_CONFIG]")
@click.option(
    "--like", type=click.Choice(choices.presets()), help="Measure a synthetic pack in the shape of this model."
)
@click.option("--layers", type=click.IntRange(min=1), help="Layers of the synthetic pack, instead of the model's own.")
@click.option("--experts", type=click.IntRange(min=1), help="Experts in each of its layers.")
@click.option("--top-k", type=click.IntRange(min=1), help="Experts that a token is given to.")
@click.option("--vocab", type=click.IntRange(min=64), help="Tokens of its vocabulary.")
@click.option(
    "--format",
    type=FormatType(choices.FORMATS[1:]),
    help="How its experts are held.  [default: as the model is published if quantised, else nf4]",
)
@click.option(
    "--dense-format",
    type=click.Choice(choices.DENSE_FORMATS),
    default="source",
    show_default=True,
    help="How its other linear layers are held.",
)
@click.option(
    "--keep",
    type=click.Path(file_okay=False, path_type=Path),
    show_default="under MOE_OFFLOAD_HOME/bench",
    help="Folder for the synthetic pack, which stays there and is used again.",
)
@click.option("--ram", type=SizeType(), multiple=True, help="Budget, like 4GiB or 80%; again for another line.")
@click.option(
    "--resident",
    type=SharesType(),
    multiple=True,
    metavar="SHARES",
    help="Budgets as shares of the experts, like 25%,50%,100%.  [default: 50%,100%, where no --ram is given]",
)
@click.option(
    "--policy",
    type=click.Choice(choices.policies()),
    multiple=True,
    default=(choices.default_policy(),),
    show_default=choices.default_policy(),
    help="Which experts stay in memory; again to compare.",
)
@click.option(
    "--prefetch",
    type=PrefetchType(),
    metavar="off|auto|N",
    multiple=True,
    default=("auto",),
    show_default="auto",
    help="Layers to look ahead; again to compare.",
)
@click.option(
    "--routing",
    default="model",
    show_default=True,
    metavar="ROUTING",
    help="Which experts tokens go to while decoding: the model's choice; trace:FILE[,sequence=N], recorded in an .npz; "
    "synthetic:mixtral or synthetic:first=P,any=P[,skew=S], drawn with given shares of repeated choices.",
)
@click.option(
    "--recall",
    type=click.FloatRange(0, 1),
    default=0.8,
    show_default=True,
    help="With a trace or synthetic routing: how much of it lookahead foresees one layer ahead.",
)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Random tokens that are read first.",
)
@click.option(
    "--new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Tokens that are decoded and timed."
)
@click.option(
    "--warmup-tokens",
    type=click.IntRange(min=0),
    default=32,
    show_default=True,
    help="Tokens decoded before, not timed.",
)
@click.option(
    "--prefill",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="Time the reading of a prompt of this length instead: the second one, after one to warm up.",
)
@click.option(
    "--repeat", type=click.IntRange(min=1), default=1, show_default=True, help="Runs of every line, in turn: A B A B."
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads that compute.  [default: as torch has it]")
@click.option(
    "--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Other random tokens and routings."
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    metavar="FILE|-",
    help="Write all figures to a file, or to the output instead of the table.",
)
@click.option(
    "--trace",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Record each run, to FILE or, where there are several, to FILE-LINE-REPEAT.",
)
def bench(
    pack: Path | None,
    like: str | None,
    keep: Path | None,
    ram: tuple[str, ...],
    resident: tuple[tuple[float, ...], ...],
    policy: tuple[str, ...],
    prefetch: tuple[str | int, ...],
    repeat: int,
    prefill: int | None,
    json_path: Path | None,
    trace: Path | None,
    **options: Any,
) -> None:
    """Measure decoding under a budget, beside what this machine allows.

    PACK_OR_CONFIG is a pack, or a config.json whose shape a synthetic pack is to have; or name a shape with --like.
    A synthetic pack has random weights, which route almost uniformly: the hardest case for a cache.

    Each run is a process of its own. The bound of a line is 1 / max(bytes missed / disk rate, bytes read from memory /
    memory rate) of one token, with the rates measured beside the runs; of a prompt, operations / rate of matrix
    products stands for the memory.

    \b
    moe-offload bench --like mixtral-8x7b --layers 8 --ram 2GiB --ram 4GiB
    moe-offload bench ~/packs/mine --resident 50% --prefetch off --prefetch auto --repeat 3
    """
    if (pack is None) == (like is None):
        raise click.UsageError("Name a pack or a config.json, or a shape with --like (one of the two).")

    from moe_offload.cli.bench_table import one_run, table
    from moe_offload.cli.consoles import notes_console
    from moe_offload.cli.opening import quiet_libraries, silence_transformers
    from moe_offload.cli.progress import TerminalProgress
    from moe_offload.cli.ranks import group_if_any, in_a_group, refuse_ranks, serve_group, serves_experts
    from moe_offload.offload.bench import run, serve_runs
    from moe_offload.offload.bench.packs import Shape, synthetic_pack
    from moe_offload.offload.bench.settings import Workload, cross
    from moe_offload.offload.pack.manifest import is_pack

    console = notes_console()
    shape_options = {
        name: options.pop(name) for name in ("layers", "experts", "top_k", "vocab", "format", "dense_format")
    }
    if prefill is not None:
        options |= {"kind": "prefill", "prompt_tokens": prefill}
    workload = Workload(**options)
    shares = [share for given in resident for share in given] or ([] if ram else [0.5, 1.0])
    settings = cross(ram=ram, resident=shares, policies=policy, prefetch=prefetch)
    progress = TerminalProgress(console)
    if in_a_group() and (pack is None or not is_pack(pack)):
        raise ConfigError("ranks that share the experts measure a pack that is there: name its folder")
    if in_a_group() and trace is not None:
        refuse_ranks("a trace is")
    if serves_experts():
        assert pack is not None
        serve_group(lambda group: serve_runs(pack, settings, workload, group, repeat=repeat), "cpu")
        return
    with quiet_libraries(console), group_if_any("cpu") as group:
        if group is not None:
            silence_transformers()
        if pack is not None and is_pack(pack):
            _refuse_shape(shape_options)
            folder, name = pack, pack.name
        else:
            shape = Shape(like if like is not None else pack, **shape_options)  # type: ignore[arg-type]
            with console.status("Starting"):
                import transformers  # noqa: F401

                silence_transformers()
            try:
                folder, name = synthetic_pack(shape, keep, progress=progress), shape.name
            finally:
                progress.abandon()
            console.print(f"pack {folder} stays there for the next time; delete it when you are done", style="dim")
        report = run(
            folder,
            settings,
            workload,
            name=name,
            repeat=repeat,
            trace=trace,
            on_run=lambda setting, figures: console.print(one_run(setting, figures), style="dim"),
            group=group,
        )
    if json_path is not None:
        text = json.dumps(report.to_dict(), indent=1) + "\n"
        if str(json_path) == "-":
            click.echo(text, nl=False)
            return
        json_path.write_text(text)
    notes_console(stderr=False).print(table(report))


def _refuse_shape(options: dict[str, Any]) -> None:
    context = click.get_current_context()
    for name in options:
        if context.get_parameter_source(name) != click.core.ParameterSource.DEFAULT:
            raise click.UsageError(f"--{name.replace('_', '-')} shapes a synthetic pack; this one is there already.")
