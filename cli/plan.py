"""``moe-offload plan``: whether a model will run and how fast, before any weight is here; and after, the check."""

import json
from pathlib import Path
from typing import Any

import click

from moe_offload.cli import choices
from moe_offload.cli.options import MODEL
from moe_offload.cli.param_types import DeviceType, FormatType, RateType, SizeType, VramType


@click.command()
@click.argument("model", type=MODEL, required=False)
@click.option("--ram", type=SizeType(), default="auto", show_default=True, help="RAM to plan for, like 32GiB.")
@click.option(
    "--vram",
    type=VramType(),
    help="GPU memory to plan for; 0=10GiB,1=10GiB: layers divided among GPUs.  [default: what is free, if there is a "
    "GPU]",
)
@click.option("--device", type=DeviceType(), default="auto", show_default=True, help="cpu: plan without the GPU.")
@click.option("--disk", type=RateType(), help="How fast the disk is read, like 3.5GB/s.  [default: measured here]")
@click.option(
    "--memory",
    type=RateType(),
    help="How fast the memory is read that computes: RAM, or the GPU's.  [default: measured here]",
)
@click.option("--pcie", "copy", type=RateType(), help="How fast RAM is copied to the GPU.  [default: measured here]")
@click.option("--download", type=RateType(), help="How fast the hub is read, like 50MB/s, for the time that it takes.")
@click.option("--context", "context_tokens", type=click.IntRange(min=1), default=4096, show_default=True)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Length of the prompt whose first token is timed.",
)
@click.option(
    "--format",
    "formats",
    type=FormatType(choices.FORMATS[1:]),
    multiple=True,
    help="Only this format of experts; again for more.  [default: source, int8, nf4, mixed:3.5, nf3]",
)
@click.option(
    "--dense-format",
    type=click.Choice(("auto", *choices.DENSE_FORMATS)),
    default="auto",
    show_default=True,
    help="How the other linear layers are held; auto: the checkpoint's numbers where they fit, else fewer bits.",
)
@click.option(
    "--routing",
    default="auto",
    show_default=True,
    metavar="ROUTING",
    help="How often experts repeat: auto, recorded routing of this model or the middle half of several; trace:FILE, "
    "your own; the name of a recorded model; even, random routers.",
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a model on the hub.")
@click.option(
    "--check",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="REPORT",
    help="Say whether a run landed in the band: the JSON of generate, bench or profile.",
)
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
def plan(
    model: str | None,
    formats: tuple[str, ...],
    dense_format: str,
    routing: str,
    context_tokens: int,
    prompt_tokens: int,
    revision: str | None,
    check: Path | None,
    as_json: bool,
    **machine: Any,
) -> None:
    """Say whether a model will run, and how fast, before anything is downloaded.

    MODEL is a hub id, a folder, a pack, a config.json, or the name of a shape (moe-offload bench --like). Only its
    config and the headers of its safetensors files are read, from a hub by range requests. Rates that are not given
    are measured here, which takes a few seconds.

    \b
    moe-offload plan Qwen/Qwen3-30B-A3B
    moe-offload plan mixtral-8x22b --ram 64GiB --vram 24GiB --disk 7GB/s --pcie 25GB/s --memory 900GB/s
    moe-offload bench PACK --ram 4GiB --json run.json && moe-offload plan --check run.json
    """
    if model is None and check is None:
        raise click.UsageError("Name a model, or a report with --check.")

    from moe_offload.cli.consoles import notes_console
    from moe_offload.cli.opening import quiet_libraries, silence_transformers
    from moe_offload.cli.plan_table import forecast_view, verdict_view

    console = notes_console()
    if check is not None:
        from moe_offload.offload.forecast.verdict import judge

        with quiet_libraries(console), console.status("Checking"):
            verdict = judge(check, routing=routing, given={k: v for k, v in machine.items() if v})
        if as_json:
            click.echo(json.dumps(verdict.to_dict(), indent=2))
        else:
            notes_console(stderr=False).print(verdict_view(verdict))
        return
    assert model is not None
    with quiet_libraries(console), console.status("Reading the shapes of the model") as status:
        from moe_offload.offload.forecast import GivenMachine, forecast, machine_of, open_shape
        from moe_offload.offload.forecast.forecast import FORMATS
        from moe_offload.offload.home import home_dir, packs_dir
        from moe_offload.offload.pack.room import free_bytes

        silence_transformers()
        shape = open_shape(model, revision=revision)
        status.update("Measuring this machine")
        here = machine_of(GivenMachine(**machine), folder=home_dir(), read_bytes=shape.read_bytes)
        status.update("Planning")
        found = forecast(
            shape,
            here,
            formats=formats or FORMATS,
            dense_format=dense_format,
            routing=routing,
            context_tokens=context_tokens,
            prompt_tokens=prompt_tokens,
        )
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
    else:
        notes_console(stderr=False).print(forecast_view(found, free_bytes(packs_dir())))
