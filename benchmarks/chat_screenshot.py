"""Makes docs/chat.svg: a real chat with the demo model in a terminal (tmux), as it looked at the end."""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

SESSION = "moe-offload-chat"
COLUMNS, LINES = 100, 34
QUESTIONS = ("What is the capital of France?", "Give me three tips for a job interview.")


def tmux(*arguments: str) -> str:
    """Run one tmux command."""
    return subprocess.run(["tmux", *arguments], check=True, capture_output=True, text=True).stdout


def wait_for(text: str, count: int, timeout_s: float = 300) -> None:
    """Until the screen shows ``text`` so many times."""
    give_up_s = time.monotonic() + timeout_s
    while tmux("capture-pane", "-p", "-S", "-200", "-t", SESSION).count(text) < count:
        if time.monotonic() > give_up_s:
            raise SystemExit(f"{text!r} did not show up:\n" + tmux("capture-pane", "-p", "-t", SESSION))
        time.sleep(0.5)


def main() -> None:
    """Run the chat, type the questions, save the screen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "docs" / "chat.svg")
    output = parser.parse_args().output
    command = f"{Path(sys.executable).parent / 'moe-offload'} chat --max-new-tokens 160"
    tmux("new-session", "-d", "-s", SESSION, "-x", str(COLUMNS), "-y", str(LINES), command)
    try:
        wait_for("loaded", 1)
        time.sleep(2)
        for asked, question in enumerate(QUESTIONS, start=1):
            tmux("send-keys", "-t", SESSION, "-l", question)
            tmux("send-keys", "-t", SESSION, "Enter")
            wait_for("tok/s", asked)
            time.sleep(1)
        screen = tmux("capture-pane", "-p", "-e", "-S", "-200", "-t", SESSION)
    finally:
        tmux("kill-session", "-t", SESSION)
    console = Console(record=True, width=COLUMNS, file=open("/dev/null", "w"), force_terminal=True)  # noqa: SIM115
    console.print(Text.from_ansi("$ moe-offload chat\n" + screen.rstrip()))
    output.write_text(console.export_svg(title="moe-offload chat"))
    print(output)


if __name__ == "__main__":
    main()
