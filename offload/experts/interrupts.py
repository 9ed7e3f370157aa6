"""Ctrl-C at places where it does no harm."""

# The functions below those of `signal`, which turn every handler into an enum and back: 10 us a step.
import _signal as signal  # type: ignore[import-not-found]
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self


class InterruptShield:
    """Within this, on the main thread, Ctrl-C waits until the next `check`, or until the end.

    Python raises KeyboardInterrupt between any two of its instructions: between two lines that belong together it would
    leave a transfer that nobody ends, or a slot that nobody gives back. On other threads nothing changes: signals do
    not reach them.
    """

    __slots__ = ("_before", "_frame", "_received")

    def __init__(self) -> None:
        self._before: Callable[[int, FrameType | None], object] | None = None
        self._frame: FrameType | None = None
        self._received = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGINT)
            if callable(before):
                self._before = before
                signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self.check()
            self._before = None

    def check(self) -> None:
        """Let through what has come: this may raise KeyboardInterrupt."""
        if self._received:
            self._received = False
            assert self._before is not None
            self._before(signal.SIGINT, self._frame)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._received, self._frame = True, frame
