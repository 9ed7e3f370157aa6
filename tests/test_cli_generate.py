import json

import cli_fake
import pytest
from click.testing import CliRunner

from moe_offload.cli.main import cli, run


def generate(monkeypatch, model, *args, stdin=None):
    cli_fake.install(monkeypatch, model)
    return CliRunner().invoke(cli, ["generate", "m", *args], input=stdin)


def test_json_of_generate(monkeypatch):
    model = cli_fake.FakeModel([["<think>hm", "m</think>", "Blue", "."]])
    result = generate(monkeypatch, model, "-p", "sky?", "--json", "--top-p", "0.9")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["text"] == "Blue."
    assert figures["thinking"] == "hmm"
    assert figures["exactness"] == "exact at nf4: identical to the fully resident model in this format"
    assert (figures["prompt_tokens"], figures["new_tokens"]) == (5, 7)
    assert figures["timings"]["tokens_per_s"] == 12.0
    assert (figures["cache"]["bytes_read"], figures["cache"]["bytes_copied"]) == (3 << 20, 2 << 20)
    assert figures["sampling"] == {"max_new_tokens": 256, "temperature": 1.0, "top_p": 0.9}
    assert model.closed


MESSAGES = [{"role": "user", "content": "sky?"}]
WITH_SYSTEM = [{"role": "system", "content": "Rhyme."}, *MESSAGES]


@pytest.mark.parametrize(
    ("args", "template", "asked"),
    [
        ([], "{{ }}", MESSAGES),
        (["--system", "Rhyme."], "{{ }}", WITH_SYSTEM),
        (["--raw"], "{{ }}", "sky?"),
        ([], None, "sky?"),
    ],
)
def test_a_prompt_is_a_message_where_the_model_chats_and_a_text_elsewhere(monkeypatch, args, template, asked):
    model = cli_fake.FakeModel(tokenizer=cli_fake.FakeTokenizer(template))
    result = generate(monkeypatch, model, "-p", "sky?", *args)
    assert result.exit_code == 0, result.output
    assert model.asked == [asked]
    assert result.stdout == "Hello there.\n"
    assert "12.0 tok/s" in result.stderr


@pytest.mark.parametrize("args", [["--chat-template"], ["--system", "Rhyme."]])
def test_a_model_without_template_cannot_take_messages(monkeypatch, args):
    model = cli_fake.FakeModel(tokenizer=cli_fake.FakeTokenizer(None))
    result = generate(monkeypatch, model, "-p", "sky?", *args)
    assert result.exit_code == 1
    assert "Error: m has no chat template, so it cannot take messages; use --raw" in result.stderr


def test_a_completion_is_taken_as_it_is(monkeypatch):
    model = cli_fake.FakeModel([["  <think>", "one</think>\n"]])
    assert generate(monkeypatch, model, "-p", "x", "--raw").stdout == "  <think>one</think>\n\n"


def test_a_prompt_may_be_piped(monkeypatch):
    model = cli_fake.FakeModel()
    generate(monkeypatch, model, "--raw", stdin="Once upon\n")
    assert model.asked == ["Once upon\n"]


@pytest.mark.parametrize(("args", "stdin"), [([], b"caf\xe9 or tea"), (["-p", "caf\udce9 or tea"], None)])
def test_what_is_not_utf8_becomes_text(monkeypatch, args, stdin):
    model = cli_fake.FakeModel()
    result = generate(monkeypatch, model, "--raw", *args, stdin=stdin)
    assert result.exit_code == 0, result.output
    (asked,) = model.asked
    assert asked.encode().decode().replace("\ufffd", "") == "caf or tea"
    assert "\ufffd" in asked


@pytest.mark.parametrize("args", [["--stream"], ["--no-stream"], ["--json"]])
def test_ctrl_c_ends_the_text_early_and_tells_by_130(monkeypatch, capsys, args):
    cli_fake.install(monkeypatch, cli_fake.FakeModel([["Some ", "<ctrl-c>", "text", "<endless>"]]))
    assert run(["generate", "m", "-p", "x", *args]) == 130
    out, err = capsys.readouterr()
    text = json.loads(out)["text"] if args == ["--json"] else out
    assert text.startswith("Some text")
    assert err.endswith("Interrupted.\n")
