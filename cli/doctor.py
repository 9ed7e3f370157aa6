"""``moe-offload doctor``: what this machine offers, measured."""

import json

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
def doctor(as_json: bool) -> None:
    """Look over this machine: memory, speeds, versions, kernels.

    Takes a few seconds. The disk is measured where packs are kept (MOE_OFFLOAD_HOME), with a file that is removed
    afterwards.
    """
    from moe_offload.cli.checkup import examine, sentences
    from moe_offload.cli.consoles import notes_console
    from moe_offload.cli.opening import quiet_libraries

    console = notes_console()
    with quiet_libraries(console), console.status("Measuring"):
        checkup = examine()
    if as_json:
        click.echo(json.dumps(checkup, indent=2))
        return
    for label, text in sentences(checkup):
        click.echo(click.style(f"{label:<9}", fg="cyan") + text)
