"""Shows the progress of packing and loading: a bar with rate and time left, or two lines where there is no terminal."""

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from moe_offload.cli.report import format_seconds
from moe_offload.offload.planning.sizes import format_size


class TerminalProgress:
    """A ``ProgressSink`` that draws on ``console``; phases follow one another."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._label = ""
        self._done_bytes = 0
        self._started_s = 0.0

    def start(self, label: str, total_bytes: int | None) -> None:
        """Begin a phase; the one before it, if any, is over."""
        if self._label:
            self.finish()
        self._label, self._done_bytes, self._started_s = label, 0, time.monotonic()
        if not self._console.is_terminal:
            of = f" ({format_size(total_bytes)})" if total_bytes else ""
            self._console.print(f"{label}{of} ...")
            return
        columns: list[ProgressColumn] = [TimeElapsedColumn()]
        if total_bytes is not None:
            columns = [BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn()]
        self._bar = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), *columns, console=self._console, transient=True
        )
        self._bar.start()
        self._bar.add_task(label, total=total_bytes)

    def advance(self, num_bytes: int) -> None:
        """``num_bytes`` more are done."""
        self._done_bytes += num_bytes
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], num_bytes)

    def finish(self) -> None:
        """End the phase, leaving a line that says what was done and how long it took."""
        if not self._label:
            return
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        took_s = time.monotonic() - self._started_s
        rate = f", {format_size(int(self._done_bytes / took_s))}/s" if self._done_bytes and took_s > 1 else ""
        done = f"{format_size(self._done_bytes)} in " if self._done_bytes else ""
        self._console.print(f"{self._label}: {done}{format_seconds(took_s)}{rate}", style="dim", highlight=False)
        self._label = ""

    def abandon(self) -> None:
        """Take the bar away after a failure, so that the message stands alone."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._label = ""
