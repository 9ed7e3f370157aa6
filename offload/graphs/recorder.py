"""What records what a thread launches, so that it can be launched again without running the code that did."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

Replay = Callable[[], None]
"""Launches what was recorded once more: the same kernels on the same memory."""


class RecordingError(Exception):
    """Something was done that cannot be recorded; what was recorded so far is void, the device is as before."""


class Pieces(Protocol):
    """Takes the pieces of one step, one after the other, in the order in which they are to be replayed."""

    def begin(self) -> None:
        """What this thread launches from now on belongs to a new piece."""

    def end(self) -> Replay:
        """The piece is whole."""


class Recorder(Pieces, Protocol):
    """Records pieces.

    Memory that a piece allocates is shared with the pieces after it, and kept for as long as any piece is. Nothing is
    computed while recording: what tensors hold then means nothing.
    """

    def session(self) -> AbstractContextManager[None]:
        """Around all pieces of a step. Raises RecordingError, also for what is done between `begin` and `end`."""


class Rehearsal:
    """Stands in a recorder's place while everything is computed that is going to be recorded.

    What libraries do at first use only, such as compiling and loading kernels, cannot be recorded.
    """

    def begin(self) -> None:
        """Go on computing."""

    def end(self) -> Replay:
        """Nothing to launch again."""
        return _nothing


def _nothing() -> None:
    """Launches nothing."""
