"""How long work tells what it has done, without knowing who watches."""

from typing import Protocol


class ProgressSink(Protocol):
    """Told about work that takes a while; calls come from one thread at a time, phases follow one another."""

    def start(self, label: str, total_bytes: int | None) -> None:
        """A phase begins; None when its size is not known."""

    def advance(self, num_bytes: int) -> None:
        """``num_bytes`` more are done."""

    def finish(self) -> None:
        """The phase is over, done or not."""


class NullProgress:
    """A sink that shows nothing."""

    def start(self, label: str, total_bytes: int | None) -> None:
        """Ignored."""

    def advance(self, num_bytes: int) -> None:
        """Ignored."""

    def finish(self) -> None:
        """Ignored."""


NULL_PROGRESS: ProgressSink = NullProgress()
