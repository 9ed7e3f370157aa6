"""``moe-offload completion``: the script that makes a shell complete commands and options."""

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that completes commands.

    \b
    bash: eval "$(moe-offload completion bash)"     in ~/.bashrc
    zsh:  eval "$(moe-offload completion zsh)"      in ~/.zshrc, after compinit
    fish: moe-offload completion fish | source      in ~/.config/fish/config.fish
    """
    make = get_completion_class(shell)
    assert make is not None
    click.echo(make(ctx.find_root().command, {}, "moe-offload", "_MOE_OFFLOAD_COMPLETE").source())
