"""A click group that imports a command's module only when it is needed, and reports errors as sentences."""

import importlib
import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import click

from moe_offload.errors import MoeOffloadError

BROKEN_PIPE = 141  # 128 + SIGPIPE, as other programs report it when `| head` has seen enough
_DEBUG = "moe_offload.debug"


@dataclass(frozen=True)
class LazyCommand:
    """Where a command is defined, as "module:name", and its line in the list of commands."""

    target: str
    short_help: str


class LazyGroup(click.Group):
    """Commands from a table; each also takes --debug."""

    def __init__(self, *args: Any, commands_table: Mapping[str, LazyCommand], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.commands_table = commands_table
        self.params.append(debug_option())

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands_table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.commands_table:
            return None
        if cmd_name not in self.commands:
            module_name, _, name = self.commands_table[cmd_name].target.partition(":")
            command = getattr(importlib.import_module(module_name), name)
            assert isinstance(command, click.Command)
            command.params.append(debug_option())
            self.commands[cmd_name] = command
        return self.commands[cmd_name]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands from the table, importing none of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.short_help) for name, command in self.commands_table.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error meant for people becomes a message, a closed pipe a quiet end."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            _discard_output()
            return ctx.exit(BROKEN_PIPE)
        except (MoeOffloadError, OSError) as error:
            if is_debug(ctx):
                traceback.print_exc()
            raise Failure(_sentence(error)) from error


class Failure(click.ClickException):
    """Ends the program with status 1 and a message in red."""

    def show(self, file: Any = None) -> None:
        click.echo(click.style("Error: ", fg="red", bold=True) + click.style(self.message, fg="red"), file, err=True)


def debug_option() -> click.Option:
    """--debug, accepted before the command and after it."""

    def remember(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        ctx.meta[_DEBUG] = value or ctx.meta.get(_DEBUG, False)

    return click.Option(
        ["--debug"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=remember,
        envvar="MOE_OFFLOAD_DEBUG",
        show_envvar=True,
        help="Show where an error came from, and the messages of the libraries.",
    )


def is_debug(ctx: click.Context | None = None) -> bool:
    """Whether --debug or MOE_OFFLOAD_DEBUG was given."""
    ctx = ctx or click.get_current_context(silent=True)
    return ctx is not None and bool(ctx.meta.get(_DEBUG, False))


def _sentence(error: MoeOffloadError | OSError) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _discard_output() -> None:
    """Point stdout at nothing, so that the interpreter's last flush does not fail on the closed pipe."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
    os.close(devnull)
