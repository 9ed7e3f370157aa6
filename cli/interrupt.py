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

from moe_offload.cli.ranks import started_by_torchrun


class Stoppable(Protocol):
    """Something that can be asked to end early."""

    def stop(self) -> None: ...


@dataclass
class Interruption:
    """Whether the user asked to stop; ``by_key``: by a key that came to this process alone."""

    asked: bool = False
    by_key: bool = False

    @property
    def is_the_end(self) -> bool:
        """Whether torchrun has passed the signal on, which ends all ranks soon."""
        return self.asked and not self.by_key and started_by_torchrun()


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
        with _quiet_keys(interruption):
            yield interruption
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _quiet_keys(interruption: Interruption) -> Iterator[None]:
    """Keep what is typed meanwhile, and ``^C``, out of the answer on the screen; it is read afterwards.

    torchrun, which has the terminal, would take Ctrl-C for the end of all ranks: under it the key is read here.
    """
    if sys.stdin is None or not sys.stdin.isatty():
        yield
        return
    if started_by_torchrun():
        from moe_offload.cli.interrupt_key import interrupt_by_key

        def pressed() -> None:
            interruption.by_key = True

        with interrupt_by_key(sys.stdin.fileno(), pressed):
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
