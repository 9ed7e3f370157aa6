"""The chat as a user meets it: a program on a pseudo-terminal, driven by key strokes."""

import os
import sys

import pytest
from terminal import Terminal

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


@pytest.fixture
def chat(tmp_path):
    terminals = []

    def start(replies, *args):
        program = CHAT.format(replies=replies, args=list(args))
        terminals.append(Terminal(tmp_path, [sys.executable, "-c", program], PYTHONWARNINGS="error"))
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
