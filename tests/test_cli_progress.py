import io

import pytest
from rich.console import Console

from moe_offload.cli import progress as progress_module
from moe_offload.cli.progress import TerminalProgress


@pytest.fixture
def shown(monkeypatch):
    """What a phase of 5 s leaves on the screen, or in a log."""

    def run(*, total_bytes, done_bytes, terminal):
        file = io.StringIO()
        console = Console(file=file, width=100, force_terminal=terminal, color_system=None)
        clock = iter([100.0, 105.0])
        monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock, 105.0))
        progress = TerminalProgress(console)
        progress.start("Working", total_bytes)
        if done_bytes:
            progress.advance(done_bytes)
        progress.finish()
        return file.getvalue()

    return run


def test_a_log_has_two_lines(shown):
    told = shown(total_bytes=10 << 20, done_bytes=10 << 20, terminal=False)
    assert told == "Working (10.0 MiB) ...\nWorking: 10.0 MiB in 5.0 s, 2.0 MiB/s\n"


def test_work_that_is_not_counted_in_bytes_has_no_rate(shown):
    assert shown(total_bytes=None, done_bytes=0, terminal=False) == "Working ...\nWorking: 5.0 s\n"
    told = shown(total_bytes=None, done_bytes=0, terminal=True)
    assert "Working: 5.0 s" in told
    assert "B/s" not in told
    assert "bytes" not in told


def test_a_bar_tells_how_much(shown):
    assert "10.0/10.0 MiB" in shown(total_bytes=10 << 20, done_bytes=10 << 20, terminal=True)
