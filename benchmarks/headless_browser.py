"""A headless Chromium, driven over a pipe by the DevTools protocol: for tests and pictures of pages."""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# The browser reads commands from descriptor 3 and answers on 4: messages of JSON, each ended by a zero byte.
COMMANDS_FD, ANSWERS_FD = 3, 4
TIMEOUT_S = 60


def find_browser() -> str | None:
    """The path of a Chromium or Chrome, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One page of the browser, with what it complained about and asked for."""

    def __init__(self, commands_fd: int, answers_fd: int) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._commands_fd, self._answers_fd = commands_fd, answers_fd
        self._unread = b""
        self._last_id = 0
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """One command of the protocol, and its result."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands_fd, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last_id:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer)

    def open(self, path: Path, *, width: int, height: int = 900, dark: bool = False, scale: float = 1.0) -> None:
        """Load a local file into a window of this size, and wait until it is laid out."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[theme])
        self.call("Page.navigate", url=path.absolute().as_uri())
        self.evaluate(
            "new Promise(done => document.readyState === 'complete' ? done() : addEventListener('load', done))"
        )

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page, awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def screenshot(self, selector: str = "html", *, margin: int = 0) -> bytes:
        """A PNG of the first element that ``selector`` finds, with so many pixels around it."""
        clip = self.evaluate(
            f"((selector, margin) => {{ const box = document.querySelector(selector).getBoundingClientRect();"
            f" return {{x: box.x + scrollX - margin, y: box.y + scrollY - margin, width: box.width + 2 * margin,"
            f" height: box.height + 2 * margin, scale: 1}} }})({json.dumps(selector)}, {margin})"
        )
        answer = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(answer["data"])

    def _note(self, event: dict[str, Any]) -> None:
        kind, details = event.get("method"), event.get("params", {})
        if kind == "Runtime.exceptionThrown":
            self.complaints.append(str(details["exceptionDetails"]))
        elif kind == "Runtime.consoleAPICalled" and details["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(details["args"]))
        elif kind == "Log.entryAdded" and details["entry"]["level"] in ("error", "warning"):
            self.complaints.append(details["entry"]["text"])
        elif kind == "Network.requestWillBeSent":
            self.requests.append(details["request"]["url"])

    def _receive(self) -> dict[str, Any]:
        give_up_s = time.monotonic() + TIMEOUT_S
        while b"\0" not in self._unread:
            if not select.select([self._answers_fd], [], [], max(0.0, give_up_s - time.monotonic()))[0]:
                raise TimeoutError(f"the browser has not answered for {TIMEOUT_S} s")
            piece = os.read(self._answers_fd, 1 << 16)
            if not piece:
                raise RuntimeError("the browser has ended")
            self._unread += piece
        message, self._unread = self._unread.split(b"\0", 1)
        answer: dict[str, Any] = json.loads(message)
        return answer


@contextlib.contextmanager
def browser_page(browser: str) -> Iterator[Page]:
    """A page in a browser of its own, which ends with it."""
    profile = tempfile.mkdtemp(prefix="moe-offload-browser-")
    reads_commands, commands = _pipe()
    answers, writes_answers = _pipe()
    quiet = os.open(os.devnull, os.O_RDWR)
    arguments = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
                 "--no-first-run", "--disable-extensions", "--disable-background-networking",
                 f"--user-data-dir={profile}", "--remote-debugging-pipe"]  # fmt: skip
    # posix_spawn rather than subprocess: it can place descriptors at the numbers that the browser expects.
    pid = os.posix_spawn(
        browser,
        arguments,
        os.environ,
        setpgroup=0,
        file_actions=[
            (os.POSIX_SPAWN_DUP2, quiet, 1),
            (os.POSIX_SPAWN_DUP2, quiet, 2),
            (os.POSIX_SPAWN_DUP2, reads_commands, COMMANDS_FD),
            (os.POSIX_SPAWN_DUP2, writes_answers, ANSWERS_FD),
        ],
    )
    try:
        for fd in (reads_commands, writes_answers, quiet):
            os.close(fd)
        yield Page(commands, answers)
    finally:
        for fd in (commands, answers):
            os.close(fd)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        shutil.rmtree(profile, ignore_errors=True)


def _pipe() -> tuple[int, int]:
    """A pipe whose ends have numbers that the browser's own descriptors do not take."""
    ends = os.pipe()
    raised = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return raised[0], raised[1]
