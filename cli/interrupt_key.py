"""Ctrl-C as a key: read by this process, where the terminal's signal would reach a launcher that ends everything."""

import os
import select
import signal
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_CTRL_C = b"\x03"
_LOCAL_FLAGS, _CHARACTERS = 3, 6  # of what tcgetattr gives


@contextmanager
def interrupt_by_key(terminal: int, pressed: Callable[[], None]) -> Iterator[None]:
    """Within this, Ctrl-C on the terminal calls ``pressed``, and is SIGINT for this process alone.

    What else is typed is not shown, and is there for the line editor afterwards.
    """
    before = termios.tcgetattr(terminal)
    raw = termios.tcgetattr(terminal)
    raw[_LOCAL_FLAGS] &= ~(termios.ECHO | termios.ICANON | termios.ISIG)
    raw[_CHARACTERS][termios.VMIN], raw[_CHARACTERS][termios.VTIME] = 1, 0
    end_read, end_write = os.pipe()
    typed = bytearray()
    reader = threading.Thread(
        target=_read, args=(terminal, end_read, typed, pressed), name="moe-offload-keys", daemon=True
    )
    termios.tcsetattr(terminal, termios.TCSADRAIN, raw)
    reader.start()
    try:
        yield
    finally:
        os.write(end_write, b"x")
        reader.join()
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
        for end in (end_read, end_write):
            os.close(end)
        if typed:
            _give_to_line_editor(bytes(typed).decode(errors="replace"))


def _read(terminal: int, end: int, typed: bytearray, pressed: Callable[[], None]) -> None:
    while True:
        ready, _, _ = select.select([terminal, end], [], [])
        if terminal not in ready:
            return
        keys = os.read(terminal, 1024)
        if not keys:  # the terminal is gone
            return
        typed += keys.replace(_CTRL_C, b"")
        for _ in range(keys.count(_CTRL_C)):
            pressed()
            os.kill(os.getpid(), signal.SIGINT)


def _give_to_line_editor(text: str) -> None:
    from prompt_toolkit.input import create_input
    from prompt_toolkit.input.typeahead import store_typeahead
    from prompt_toolkit.input.vt100_parser import Vt100Parser
    from prompt_toolkit.key_binding.key_processor import KeyPress

    keys: list[KeyPress] = []
    parser = Vt100Parser(keys.append)
    parser.feed(text)
    parser.flush()
    store_typeahead(create_input(), keys)
