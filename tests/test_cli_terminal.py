"""The chat as a user meets it: a program on a pseudo-terminal, driven by key strokes."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CHAT = """
import sys, cli_fake, pytest
from moe_offload.cli.main import run
replies = {replies!r}
with pytest.MonkeyPatch.context() as patch:
    model = cli_fake.FakeModel(replies)
    cli_fake.install(patch, model)
    status = run(["chat", "some/model", *{args!r}])
print("ASKED", model.asked)
sys.exit(status)
"""
CTRL_C, CTRL_D, ENTER, ALT_ENTER, UP = "\x03", "\x04", "\r", "\x1b\r", "\x1b[A"
_ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[a-zA-Z]|\][^\x07]*\x07|[=>78])")
DEADLINE_S = 60


class Terminal:
    """A program on a terminal of 100 x 30."""

    def __init__(self, home, replies, *args):
        self.master, slave = pty.openpty()
        import fcntl
        import struct
        import termios

        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        environment = os.environ | {"TERM": "xterm-256color", "MOE_OFFLOAD_HOME": str(home), "PYTHONWARNINGS": "error"}
        environment.pop("NO_COLOR", None)
        self.program = subprocess.Popen(
            [sys.executable, "-c", CHAT.format(replies=replies, args=list(args))],
            cwd=TESTS,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self.raw = ""
        self.seen = 0

    def type(self, keys):
        os.write(self.master, keys.encode())

    def wait_for(self, text):
        """Read on until ``text`` shows up after what was waited for before."""
        deadline = time.monotonic() + DEADLINE_S
        while (at := self.raw.find(text, self.seen)) < 0:
            ready, _, _ = select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come; the terminal got {self.raw!r}"
            try:
                self.raw += os.read(self.master, 65536).decode(errors="replace")
            except OSError as error:
                raise AssertionError(f"{text!r} did not come; the program ended after {self.raw!r}") from error
            if "\x1b[6n" in self.raw[self.seen :]:
                self.type("\x1b[1;1R")  # a terminal tells where its cursor is when it is asked
                self.raw = self.raw.replace("\x1b[6n", "")
        self.seen = at + len(text)

    def wait_for_prompt(self):
        self.wait_for("\x1b[?2004h")  # the line editor switches bracketed paste on

    def end(self):
        """The exit status, once the program has ended."""
        try:
            while True:
                self.raw += os.read(self.master, 65536).decode(errors="replace")
        except OSError:
            return self.program.wait(DEADLINE_S)

    @property
    def text(self):
        return _ESCAPES.sub("", self.raw)


@pytest.fixture
def chat(tmp_path):
    terminals = []

    def start(replies, *args):
        terminals.append(Terminal(tmp_path, replies, *args))
        return terminals[-1]

    yield start
    for terminal in terminals:
        if terminal.program.poll() is None:
            terminal.program.kill()
            terminal.program.wait()
        os.close(terminal.master)


def test_a_conversation(chat):
    terminal = chat([["<think>let me ", "see</think>", "Hello **th", "ere**."], ["Good bye."]])
    terminal.wait_for_prompt()
    terminal.type("Hi" + ALT_ENTER + "you" + ENTER)
    terminal.wait_for("let me see")
    terminal.wait_for("there")
    terminal.wait_for("12.0 tok/s · first 0.2 s · 75% hits · 3.0 MiB read · 0.1 s stalled · 7 tokens")
    terminal.wait_for_prompt()
    terminal.type("Bye" + ENTER)
    terminal.wait_for("Good bye.")
    terminal.wait_for_prompt()
    terminal.type("/exit" + ENTER)
    assert terminal.end() == 0
    assert "exact at nf4: identical to the fully resident model in this format" in terminal.text
    assert "Hello \x1b[1mthere\x1b[0m." in terminal.raw
    assert (
        "{'role': 'user', 'content': 'Hi\\nyou'}, {'role': 'assistant', 'content': 'Hello **there**.'}" in terminal.text
    )


@pytest.mark.parametrize("args", [[], ["--plain"]])
def test_ctrl_c_stops_the_answer_and_not_the_program(chat, args):
    terminal = chat([["Starting ", "<endless>"], ["Second."]], *args)
    terminal.wait_for_prompt()
    terminal.type("Go" + ENTER)
    terminal.wait_for("on and on")
    terminal.type(CTRL_C)
    terminal.wait_for("stopped · 12.0 tok/s")
    terminal.wait_for_prompt()
    terminal.type("half a message" + CTRL_C)
    terminal.wait_for_prompt()
    terminal.type("Again" + ENTER)
    terminal.wait_for("Second.")
    terminal.wait_for_prompt()
    terminal.type(CTRL_D)
    assert terminal.end() == 0
    assert "'content': 'Again'" in terminal.text
    assert "'content': 'half" not in terminal.text
    assert "^C" not in terminal.text


def test_a_second_ctrl_c_ends_a_program_that_does_not_stop(chat):
    terminal = chat([["Starting ", "<deaf>"]])
    terminal.wait_for_prompt()
    terminal.type("Go" + ENTER)
    terminal.wait_for("deaf and")
    terminal.type(CTRL_C)
    terminal.wait_for("was asked to stop")
    terminal.type(CTRL_C)
    terminal.wait_for("Interrupted.")
    assert terminal.end() == 130
    assert "Traceback" not in terminal.text


def test_a_paste_is_one_message(chat):
    terminal = chat([["Yes."]])
    terminal.wait_for_prompt()
    terminal.type("\x1b[200~def f():\n    return 1\n\x1b[201~" + ENTER)
    terminal.wait_for("12.0 tok/s")
    terminal.wait_for_prompt()
    terminal.type(CTRL_D)
    assert terminal.end() == 0
    assert r"[[{'role': 'user', 'content': 'def f():\n    return 1'}]]" in terminal.text


def test_the_history_outlives_the_program(chat):
    for keys in ("Remember this" + ENTER, UP + ENTER):
        terminal = chat([["Yes."]])
        terminal.wait_for_prompt()
        terminal.type(keys)
        terminal.wait_for("12.0 tok/s")
        terminal.wait_for_prompt()
        terminal.type(CTRL_D)
        assert terminal.end() == 0
        assert "[[{'role': 'user', 'content': 'Remember this'}]]" in terminal.text
