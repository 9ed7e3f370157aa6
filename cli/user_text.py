"""Text from the user: bytes that are not UTF-8 become U+FFFD, since a tokenizer would fail on them."""

import io
import sys


def mended(text: str) -> str:
    """``text`` without the surrogates that Python puts in the place of such bytes."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def piped_text() -> str:
    """All of the standard input; nothing if it is closed."""
    if sys.stdin is None:
        return ""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    try:
        return mended(sys.stdin.read())
    except OSError:
        return ""
