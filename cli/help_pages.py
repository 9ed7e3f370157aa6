"""Writes the help of every command as one page: ``python -m moe_offload.cli.help_pages > docs/cli.md``."""

import click

from moe_offload.cli.main import cli

_WIDTH = 100
_HEAD = """# The command line

What `moe-offload COMMAND --help` prints. Made by `python -m moe_offload.cli.help_pages > docs/cli.md`.
"""


def help_pages() -> str:
    """The page, in Markdown."""
    root = cli.make_context("moe-offload", [], resilient_parsing=True, terminal_width=_WIDTH, color=False)
    parts = [_HEAD, _page(root)]
    for name in cli.list_commands(root):
        command = cli.get_command(root, name)
        assert command is not None
        parts.append(_page(command.make_context(name, [], root, resilient_parsing=True, terminal_width=_WIDTH)))
    return "\n".join(parts)


def _page(context: click.Context) -> str:
    return f"## {context.command_path}\n\n```text\n{context.get_help()}\n```\n"


if __name__ == "__main__":
    click.echo(help_pages(), nl=False)
