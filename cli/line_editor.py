"""Reads messages from a terminal: line editing, several lines, a history that stays."""

from collections.abc import Callable, Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.shortcuts import CompleteStyle

from moe_offload.cli.slash_commands import COMMANDS


def message_reader(history_file: Path) -> Callable[[], str]:
    """A function that asks for one message; it raises EOFError on Ctrl-D and KeyboardInterrupt on Ctrl-C."""
    session: PromptSession[str] = PromptSession(
        message=FormattedText([("bold ansigreen", "> ")]),
        prompt_continuation="  ",
        placeholder=FormattedText([("ansibrightblack", "Ask something; /help shows what else there is")]),
        multiline=True,
        history=_history(history_file),
        key_bindings=_keys(),
        completer=_CommandCompleter(),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
    )
    return session.prompt


def _keys() -> KeyBindings:
    """Enter sends, Alt+Enter (which terminals send as Esc Enter) starts a line; a paste is taken as it is.

    Ctrl-J sends too: what was typed during an answer comes with its Enter turned into that.
    """
    keys = KeyBindings()

    @keys.add("enter")
    @keys.add("c-j")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("escape", "c-j")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history(path: Path) -> History:
    """The history in ``path``, readable by the user alone; one in memory where no file can be kept."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(path)


class _CommandCompleter(Completer):
    """Completes the names of commands at the start of a message."""

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or " " in text:
            return
        for name, command in COMMANDS.items():
            if name.startswith(text[1:]):
                yield Completion(f"/{name}", start_position=-len(text), display_meta=command.help)
