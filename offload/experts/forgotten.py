"""Closing what nobody has closed: by a thread of its own, which ends before the interpreter does."""

import _thread
import atexit
import sys
import time
from collections.abc import Callable

EXIT_TIMEOUT_S = 10.0
_running: list[object] = []


def close_apart(close: Callable[[], None]) -> None:
    """Call ``close`` soon, by a thread; not at all once the interpreter is on its way out, which frees everything.

    Garbage is collected in the middle of anything, perhaps under the very locks that closing takes: so it must not be
    closed there and then. The lowest way to start a thread takes no lock.
    """
    if sys.is_finalizing():
        return
    token = object()
    _running.append(token)
    # In a box that is emptied: what only ``close`` keeps alive is to be gone before the thread counts as done.
    _thread.start_new_thread(_run, ([close], token))


def _run(box: list[Callable[[], None]], token: object) -> None:
    try:
        box.pop()()
    finally:
        _running.remove(token)


@atexit.register
def _wait() -> None:
    """A thread that the interpreter ends while it frees a tensor takes the process down with it (SIGABRT)."""
    end_s = time.monotonic() + EXIT_TIMEOUT_S
    while _running and time.monotonic() < end_s:
        time.sleep(0.005)
