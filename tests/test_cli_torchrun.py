"""A chat on several ranks, as torchrun starts it on a terminal: real ranks over gloo, and key strokes."""

import json
import os
import signal
import sys

import pytest
from expert_ranks import free_port
from loaded_models import make_pack
from terminal import Terminal

CTRL_C, ENTER = "\x03", "\r"
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    folder = make_pack(tmp_path_factory.mktemp("chat"), "mixtral", hidden_size=64, intermediate_size=64)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    for name in ("config.json", "generation_config.json"):  # it does not end by itself
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(settings | {"eos_token_id": None}))
    return folder


@pytest.fixture
def chat(pack, tmp_path):
    """Two ranks on a terminal; they can talk for long."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    options = ["--ram", "1GiB", "--device", "cpu", "--context", "8192", "--max-new-tokens", "8000", "--no-warm-start"]
    command = [*launcher, "-m", "moe_offload", "chat", str(pack), "--plain", "--temperature", "0", *options]
    terminal = Terminal(tmp_path, command, OMP_NUM_THREADS="1")
    yield terminal
    if terminal.program.poll() is None:
        terminal.program.kill()
        terminal.program.wait()
    os.close(terminal.master)


def say(chat, keys):
    """Send a message, and wait for the answer to begin."""
    chat.type(keys)
    chat.wait_for("\x1b[?2004l")  # the line editor is done
    chat.wait_for(" w")


def test_ctrl_c_stops_the_answer_and_not_the_ranks(chat):
    chat.wait_for_prompt()
    say(chat, "w5 w17" + ENTER)
    chat.type("w33 w61" + CTRL_C)
    chat.wait_for("stopped")
    chat.wait_for_prompt()
    chat.wait_for("w33 w61")  # what was typed during the answer
    say(chat, ENTER)
    chat.type(CTRL_C)
    chat.wait_for("stopped")
    chat.wait_for_prompt()
    chat.type("half" + CTRL_C)
    chat.wait_for_prompt()
    chat.type("/exit" + ENTER)
    assert chat.end() == 0


def test_a_launcher_that_is_told_to_end_ends_all_ranks(chat):
    chat.wait_for_prompt()
    say(chat, "w5 w17" + ENTER)
    chat.program.send_signal(signal.SIGINT)
    chat.wait_for("torchrun was told to end, and ends all ranks")
    assert chat.end() != 0
