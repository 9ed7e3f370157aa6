"""``moe-offload pack``: makes a pack of a checkpoint."""

from pathlib import Path
from typing import Any

import click

from moe_offload.cli.options import MODEL, format_options


@click.command()
@click.argument("model", type=MODEL)
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    show_default="under MOE_OFFLOAD_HOME, where chat and generate find it",
    help="Folder to write.",
)
@click.option(
    "--share",
    metavar="RANK/RANKS",
    help="Only the experts of one rank, like 0/2 and 1/2, for machines that share a model with torchrun.",
)
@format_options
def pack(model: str, output: Path | None, share: str | None, **formats: Any) -> None:
    """Make an expert pack of a checkpoint, ready to run.

    MODEL is a folder or a name on the Hugging Face hub (models that ask for a login: set HF_TOKEN). Whatever stops
    the packing, the same command goes on where it was.
    """

    from moe_offload.cli.consoles import notes_console
    from moe_offload.cli.opening import quiet_libraries, silence_transformers
    from moe_offload.cli.progress import TerminalProgress
    from moe_offload.offload.planning.sizes import format_size

    console = notes_console()
    progress = TerminalProgress(console)
    with quiet_libraries(console):
        with console.status("Starting"):
            from moe_offload.offload.pack.manifest import read_manifest
            from moe_offload.offload.pack.packer import pack_model
            from moe_offload.offload.pack.share import Share

            silence_transformers()
        try:
            part = None if share is None else Share.parse(share)
            folder = pack_model(model, output, share=part, progress=progress, **formats)
        finally:
            progress.abandon()
        manifest = read_manifest(folder)
    click.echo(folder)
    click.echo(
        f"experts {format_size(manifest.expert_bytes)} in {manifest.expert_format}, "
        f"the rest {format_size(manifest.dense_bytes)} in {manifest.dense_format}",
        err=True,
    )
