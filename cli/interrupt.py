"""Ctrl-C while an answer is written: the first asks the model to stop, a second one is a KeyboardInterrupt."""

import signal
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Protocol


class Stoppable(Protocol):
    """Something that can be asked to end early."""

    def stop(self) -> None: ...


@dataclass
class Interruption:
    """Whether the user asked to stop."""

    asked: bool = False


@contextmanager
def stop_on_interrupt(model: Stoppable) -> Iterator[Interruption]:
    """Within this, Ctrl-C stops ``model``; signals reach the main thread only, elsewhere nothing changes."""
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    def on_interrupt(signum: int, frame: FrameType | None) -> None:
        if interruption.asked:
            raise KeyboardInterrupt
        interruption.asked = True
        model.stop()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        with _no_echo():
            yield interruption
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _no_echo() -> Iterator[None]:
    """Keep what is typed meanwhile, and ``^C``, out of the answer on the screen; it is read afterwards."""
    if sys.stdin is None or not sys.stdin.isatty():
        yield
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    quiet = termios.tcgetattr(terminal)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
