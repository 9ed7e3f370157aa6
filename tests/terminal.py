"""A program on a pseudo-terminal, for tests that type."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from pathlib import Path

_ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[a-zA-Z]|\][^\x07]*\x07|[=>78])")
DEADLINE_S = 60


class Terminal:
    """A program on a terminal of 100 x 30."""

    def __init__(self, home, command, **environment):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        environment = os.environ | {"TERM": "xterm-256color", "MOE_OFFLOAD_HOME": str(home)} | environment
        environment.pop("NO_COLOR", None)
        self.program = subprocess.Popen(
            command,
            cwd=Path(__file__).parent,
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
            assert ready, f"{text!r} did not come; the terminal got {self.raw[-2000:]!r}"
            try:
                self.raw += os.read(self.master, 65536).decode(errors="replace")
            except OSError as error:
                raise AssertionError(f"{text!r} did not come; the program ended after {self.raw[-2000:]!r}") from error
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
