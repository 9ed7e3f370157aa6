"""Shows an answer while it is being written: as Markdown on a terminal, as plain text elsewhere."""

import re
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self, TextIO

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.spinner import Spinner
from rich.text import Text

from moe_offload.cli.thinking import Piece

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a model must not steer the terminal
_LINE = re.compile(r"[^\n]*\n|[^\n]+")  # what ends a line in Markdown; str.splitlines knows other ends
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])


class AnswerView(Protocol):
    """Used as a context around one answer."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def show(self, piece: Piece) -> None:
        """Add a piece to what is seen."""


class PlainView:
    """Writes the text as it comes. ``thinking``: also the thinking, dimmed; else the answer alone."""

    def __init__(self, out: TextIO, *, thinking: bool) -> None:
        self._out = out
        self._thinking = thinking
        self._last: str | None = None

    def __enter__(self) -> Self:
        self._last = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._last is not None:
            self._write("\n")

    def show(self, piece: Piece) -> None:
        """Write the piece at once."""
        if piece.kind == "thinking" and not self._thinking:
            return
        if self._last not in (None, piece.kind):
            self._write("\n\n")
        self._last = piece.kind
        text = _CONTROLS.sub("", piece.text) if self._out.isatty() else piece.text
        self._write(f"\x1b[2m{text}\x1b[22m" if piece.kind == "thinking" else text)

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


class MarkdownView:
    """Renders Markdown live.

    Blocks that are complete are printed for good; only the one being written is drawn again and again, cropped to
    the last lines that fit, so that no answer is too long for the screen.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._open = Piece("answer", "")  # the part that may still change
        self._started = False

    def __enter__(self) -> Self:
        self._open, self._started = Piece("answer", ""), False
        self._live = _CalmLive(self, self._console)
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        rest, self._open = self._open, Piece("answer", "")
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._print(rest)

    def show(self, piece: Piece) -> None:
        """Take the piece in; it is seen at the next refresh."""
        text = _CONTROLS.sub("", piece.text)
        if piece.kind != self._open.kind:
            finished, self._open = self._open, Piece(piece.kind, text)
            self._print(finished)
        else:
            self._open = Piece(piece.kind, self._open.text + text)
        if "\n" in text:
            *finished_texts, rest = _blocks(self._open)
            self._open = Piece(piece.kind, rest)
            for finished_text in finished_texts:
                self._print(Piece(piece.kind, finished_text))

    def _print(self, piece: Piece) -> None:
        if not piece.text.strip():
            return
        if self._started:
            self._console.print()
        self._started = True
        lines = self._console.render_lines(_rendered(piece), pad=False)
        self._console.print(_Lines(_without_blank_ends(lines)), soft_wrap=True)

    @property
    def state(self) -> Piece | Spinner:
        """What is being written, or the spinner as long as nothing was."""
        return self._open if self._started or self._open.text.strip() else _SPINNER

    def being_written(self) -> RenderableType:
        """What the live part of the screen shows."""
        state = self.state
        return _rendered(state) if isinstance(state, Piece) else state


_SPINNER = Spinner("dots", style="dim")


@dataclass(frozen=True)
class _Lines:
    """Lines that are rendered already."""

    lines: list[list[Segment]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.lines:
            yield from line
            yield Segment.line()


class _Tail:
    """The last lines of what is being written, as many as fit on the screen."""

    def __init__(self, view: MarkdownView) -> None:
        self._view = view

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._view.being_written(), options.update(height=None), pad=False)
        yield _Lines(lines[-max(1, options.size.height - 2) :])


class _CalmLive(Live):
    """Draws ten times a second, but only what has changed: a terminal may be far away."""

    def __init__(self, view: MarkdownView, console: Console) -> None:
        self._view = view
        self._drawn: Piece | Spinner | None = None
        super().__init__(_Tail(view), console=console, refresh_per_second=10, transient=True)

    def refresh(self) -> None:
        """Called by a thread of its own."""
        now = self._view.state
        if now is not self._drawn or now is _SPINNER:
            self._drawn = now
            super().refresh()


class _AnswerMarkdown(Markdown):
    """Markdown that shows HTML as text instead of dropping it, and addresses instead of hiding them."""

    def __init__(self, markup: str) -> None:
        super().__init__(markup, hyperlinks=False)
        self.parsed = _PARSER.parse(markup)


def _rendered(piece: Piece) -> RenderableType:
    return Text(piece.text.strip("\n"), style="dim") if piece.kind == "thinking" else _AnswerMarkdown(piece.text)


def _blocks(piece: Piece) -> list[str]:
    """The text cut where its blocks begin; more text can change the last one only."""
    if piece.kind == "thinking":
        return re.split(r"(?<=\n)\n+", piece.text)
    starts = [
        token.map[0] for token in _PARSER.parse(piece.text) if token.level == 0 and token.nesting >= 0 and token.map
    ]
    lines = _LINE.findall(piece.text)
    return ["".join(lines[start:end]) for start, end in zip([0, *starts[1:]], [*starts[1:], None], strict=True)]


def _without_blank_ends(lines: list[list[Segment]]) -> list[list[Segment]]:
    """Markdown puts blank lines around some kinds of blocks; between blocks one is enough."""
    shown = [number for number, line in enumerate(lines) if any(segment.text.strip() for segment in line)]
    return lines[shown[0] : shown[-1] + 1] if shown else []
