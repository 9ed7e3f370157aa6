import subprocess
import sys
from pathlib import Path

import cli_fake
import click
import pytest
from click.testing import CliRunner

from moe_offload._version import VERSION
from moe_offload.cli import choices, main
from moe_offload.cli.help_pages import help_pages
from moe_offload.cli.main import COMMANDS, cli
from moe_offload.errors import BudgetError

REPO = Path(__file__).parent.parent
HEAVY = {"torch", "transformers", "rich.markdown", "rich.console", "prompt_toolkit", "psutil"}


def run_program(*args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moe_offload", *args], input=stdin, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("args", [["--help"], ["--version"], [], ["chat", "--help"], ["generate", "--help"], ["nope"]])
def test_help_imports_nothing_heavy(args):
    script = f"""
import sys
from moe_offload.cli.main import run
run({args!r})
print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)
print(sorted(name for name in sys.modules if name.startswith("moe_offload.")), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    heavy, modules = done.stderr.splitlines()[-2:]
    assert heavy == "[]"
    if args == ["--help"]:
        own = ["_version", "cli", "cli.lazy_group", "cli.main", "errors"]
        assert modules == str([f"moe_offload.{name}" for name in own])


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_and_the_commands_agree(name):
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.name == name
    assert command.get_short_help_str(200) == COMMANDS[name].short_help


def test_the_formats_offered_are_those_there_are():
    from moe_offload.offload.pack.mixed import MIXED
    from moe_offload.quant import format_names

    assert set(choices.DENSE_FORMATS) == {"source", *format_names()}
    assert set(choices.FORMATS) == {"auto", *choices.DENSE_FORMATS, MIXED}


def test_the_defaults_in_the_help_are_those_of_from_pretrained():
    import inspect

    from moe_offload.cli.chat import chat

    model = pytest.importorskip("moe_offload.offload.model")
    parameters = inspect.signature(model.OffloadedModel.from_pretrained).parameters
    load = (
        "ram",
        "vram",
        "device",
        "context_tokens",
        "policy",
        "prefetch",
        "verify",
        "dtype",
        "format",
        "dense_format",
    )
    options = {option.name: option.default for option in chat.params}
    assert {name: options[name] for name in load} == {name: parameters[name].default for name in load}


def test_the_help_pages_in_docs_are_fresh():
    written = (REPO / "docs" / "cli.md").read_text()
    assert written == help_pages(), "run: python -m moe_offload.cli.help_pages > docs/cli.md"


def test_the_program_runs_as_a_module():
    done = run_program("--version")
    assert (done.returncode, done.stdout) == (0, f"moe-offload {VERSION}\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["chta"], "No such command 'chta'"),
        (["chat", "--ram", "5Gob"], "'Gob' in '5Gob' is not a unit of memory"),
        (["chat", "--prefetch", "some"], "'some' is neither off, auto nor a number of layers"),
        (["chat", "--prefetch", "0"], "'0' is neither off, auto nor a number of layers"),
        (["chat", "--seed", "5000000000"], "is not in the range"),
        (["chat", "--device", "tpu"], "'tpu' is not a device; use auto, cpu, cuda or cuda:0"),
        (["chat", "--format", "q4"], "'q4' is not one of 'auto', 'source'"),
        (["generate", "m"], "The input is empty: pipe a prompt in"),
        (["generate", "m", "-p", "x", "--raw", "--system", "s"], "--system needs a chat; leave out --raw."),
        (["generate"], "Missing argument 'MODEL'"),
    ],
)
def test_wrong_usage_is_told_with_status_2(args, message):
    done = run_program(*args)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_is_one_message_and_status_1(monkeypatch):
    error = BudgetError("needs 7.2 GiB, budget 6.0 GiB; use --ram 8GiB", needed_bytes=72, budget_bytes=60)
    cli_fake.install(monkeypatch, cli_fake.FakeModel(), error)
    result = CliRunner().invoke(cli, ["generate", "m", "-p", "x"])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "Error: needs 7.2 GiB, budget 6.0 GiB; use --ram 8GiB"
    assert "Traceback" not in result.output


@pytest.mark.parametrize("where", ["before", "after", "environment"])
def test_debug_shows_the_traceback(monkeypatch, where):
    cli_fake.install(monkeypatch, cli_fake.FakeModel(), BudgetError("too small", needed_bytes=2, budget_bytes=1))
    args = ["generate", "m", "-p", "x"]
    args = {"before": ["--debug", *args], "after": [*args, "--debug"], "environment": args}[where]
    result = CliRunner().invoke(cli, args, env={"MOE_OFFLOAD_DEBUG": "1"} if where == "environment" else {})
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "BudgetError: too small" in result.stderr
    assert result.stderr.endswith("Error: too small\n")


def test_ctrl_c_while_loading_ends_with_130(monkeypatch, capsys):
    cli_fake.install(monkeypatch, cli_fake.FakeModel(), KeyboardInterrupt())
    assert main.run(["generate", "m", "-p", "x"]) == 130
    assert capsys.readouterr().err.endswith("Interrupted.\n")


def test_a_closed_pipe_is_a_quiet_end():
    script = """
import sys, cli_fake, pytest
from moe_offload.cli.main import run
with pytest.MonkeyPatch.context() as patch:
    cli_fake.install(patch, cli_fake.FakeModel([["line\\n"] * 100_000]))
    sys.exit(run(["generate", "m", "-p", "x", "--stream"]))
"""
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=REPO / "tests",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        assert program.stdout.readline() == "line\n"
        program.stdout.close()
        errors = program.stderr.read()
    assert program.returncode == 141
    assert "Traceback" not in errors
    assert "Exception" not in errors


@pytest.mark.parametrize(
    ("shell", "mark"), [("bash", "complete -o nosort -F"), ("zsh", "#compdef"), ("fish", "complete ")]
)
def test_completion_scripts(shell, mark):
    result = CliRunner().invoke(cli, ["completion", shell])
    assert result.exit_code == 0
    assert mark in result.stdout
    assert "_MOE_OFFLOAD_COMPLETE" in result.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("moe-offload ge", "plain,generate"),
        ("moe-offload chat --ver", "plain,--verify"),
        ("moe-offload chat --format i", "plain,int8\nplain,int4"),
        ("moe-offload chat --device cu", "plain,cuda"),
        ("moe-offload chat ./so", "dir,./so"),
    ],
)
def test_completions(monkeypatch, words, expected):
    monkeypatch.setenv("_MOE_OFFLOAD_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    assert run_program().stdout.strip() == expected
