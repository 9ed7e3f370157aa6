"""The commands inside a chat."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from moe_offload.cli.report import totals
from moe_offload.cli.transcript import Turn, write_transcript

if TYPE_CHECKING:
    from moe_offload.cli.chat_session import ChatSession

_KEYS = {
    "Alt+Enter": "new line (also Esc, then Enter); pasted lines stay together",
    "Up, Down, Ctrl-R": "earlier messages",
    "Ctrl-C": "stop the answer",
    "Ctrl-D": "leave",
}


@dataclass(frozen=True)
class SlashCommand:
    """``run`` takes the session, what follows the command's name, and whether a ``!`` was added to it."""

    usage: str
    help: str
    run: Callable[["ChatSession", str, bool], None]


def _help(session: "ChatSession", rest: str, force: bool) -> None:
    rows = [(command.usage, command.help) for command in COMMANDS.values()] + list(_KEYS.items())
    session.notes.print(_grid(rows))


def _system(session: "ChatSession", rest: str, force: bool) -> None:
    if rest:
        session.system = None if rest == "off" else rest
    session.notes.print(
        Text(f"System prompt: {session.system}" if session.system else "No system prompt.", style="dim")
    )


def _reset(session: "ChatSession", rest: str, force: bool) -> None:
    session.turns.clear()
    session.notes.print(Text("Forgotten; the system prompt stays.", style="dim"))


def _save(session: "ChatSession", rest: str, force: bool) -> None:
    if not rest:
        session.notes.print(Text("Say where: /save FILE.md or /save FILE.json", style="yellow"))
        return
    path = Path(os.path.expanduser(rest))  # Path's own raises RuntimeError where there is no such user
    turns = ([Turn("system", session.system)] if session.system else []) + session.turns
    try:
        replaced = write_transcript(path, turns, model=session.model_name, overwrite=force)
    except FileExistsError:
        session.notes.print(Text(f"{path} is there already; /save! {rest} replaces it.", style="yellow"))
        return
    session.notes.print(Text(f"{'Replaced' if replaced else 'Saved'} {path}", style="dim"))


def _stats(session: "ChatSession", rest: str, force: bool) -> None:
    session.notes.print(_grid(totals(session.model.stats)))


def _exit(session: "ChatSession", rest: str, force: bool) -> None:
    session.over = True


def _grid(rows: list[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for label, value in rows:
        grid.add_row(Text(label, style="cyan"), Text(value))
    return grid


COMMANDS = {
    "help": SlashCommand("/help", "this list", _help),
    "system": SlashCommand("/system TEXT", "set the system prompt; off: none; nothing: show it", _system),
    "reset": SlashCommand("/reset", "forget the conversation", _reset),
    "save": SlashCommand("/save FILE", "write the conversation: .json, or Markdown; /save! replaces a file", _save),
    "stats": SlashCommand("/stats", "tokens, speed, cache and disk since loading", _stats),
    "exit": SlashCommand("/exit", "leave", _exit),
}
