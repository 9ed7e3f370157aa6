"""Where notes go: everything a command says that is not its result."""

import sys

from rich.console import Console


def notes_console(*, stderr: bool = True) -> Console:
    """A console whose lines are broken on terminals only, so that a log of it can be searched."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, soft_wrap=not stream.isatty())
