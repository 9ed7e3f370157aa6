"""Tells a model's thinking from its answer, in a stream that may break anywhere.

Knows ``<think>…</think>`` (DeepSeek, Qwen and most others), ``[THINK]…[/THINK]`` (Mistral) and the channels of gpt-oss:
``<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…<|return|>``.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

_CLOSERS = {"<think>": "</think>", "[THINK]": "[/THINK]"}
_CHANNEL = re.compile(r"(?:<\|start\|>assistant)?<\|channel\|>\s*(\w+)[^<]*(?:<\|constrain\|>\w+\s*)?<\|message\|>")
_CHANNEL_STARTS = ("<|start|>", "<|channel|>")
_CHANNEL_ENDS = ("<|end|>", "<|return|>", "<|call|>")
_HEADER_CHARS = 200  # longer than any header of a channel: what does not end by then is not one


@dataclass(frozen=True)
class Piece:
    """A stretch of the stream."""

    kind: Literal["thinking", "answer"]
    text: str


class ThinkingSplitter:
    """Cuts a stream into pieces, keeping the markers to itself.

    Thinking opens only where no answer has begun, so that an answer may speak of ``<think>`` tags.
    ``starts_thinking``: the prompt already opened a ``<think>`` block, as some chat templates do.
    """

    def __init__(self, *, starts_thinking: bool = False) -> None:
        self._held = ""
        self._kind: Literal["thinking", "answer"] | None = "thinking" if starts_thinking else None
        self._ends: tuple[str, ...] = ("</think>",) if starts_thinking else ()
        self._blank = True  # nothing of this piece was shown yet: leading white space is dropped

    def feed(self, text: str) -> Iterator[Piece]:
        """The pieces that ``text`` completes; the beginning of a possible marker waits for the rest."""
        self._held += text
        while True:
            if self._kind is None and not self._open():
                return
            shown, closed = self._take_until_end()
            if self._blank:
                shown = shown.lstrip()
            if shown and self._kind is not None:
                self._blank = False
                yield Piece(self._kind, shown)
            if not closed:
                return
            self._kind = None

    def finish(self) -> Iterator[Piece]:
        """What was still waiting when the stream ended."""
        held, self._held = self._held, ""
        if held.strip():
            yield Piece(self._kind or "answer", held)

    def _open(self) -> bool:
        """Decide what begins here; False if that takes more text."""
        self._held = self._held.lstrip()
        if not self._held:
            return False
        self._blank = True
        for opener, closer in _CLOSERS.items():
            if self._held.startswith(opener):
                self._held = self._held[len(opener) :]
                self._kind, self._ends = "thinking", (closer,)
                return True
        channel = _CHANNEL.match(self._held)
        if channel is not None:
            self._held = self._held[channel.end() :]
            self._kind, self._ends = "answer" if channel[1] == "final" else "thinking", _CHANNEL_ENDS
            return True
        if any(opener.startswith(self._held) for opener in (*_CLOSERS, *_CHANNEL_STARTS)):
            return False
        if self._held.startswith(_CHANNEL_STARTS) and len(self._held) < _HEADER_CHARS:
            return False
        self._kind, self._ends = "answer", ()
        return True

    def _take_until_end(self) -> tuple[str, bool]:
        """The text up to the end of this piece, and whether the end is there."""
        found = [(at, end) for end in self._ends if (at := self._held.find(end)) >= 0]
        if found:
            at, end = min(found)
            shown, self._held = self._held[:at], self._held[at + len(end) :]
            return shown, True
        waiting = max((_overlap(self._held, end) for end in self._ends), default=0)
        cut = len(self._held) - waiting
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False


def prompt_opens_thinking(prompt: str) -> bool:
    """Whether a prompt made by a chat template ends inside a ``<think>`` block."""
    return prompt.rstrip().endswith("<think>")


def _overlap(text: str, marker: str) -> int:
    """How many characters at the end of ``text`` are the beginning of ``marker``."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if marker.startswith(text[-length:]):
            return length
    return 0
