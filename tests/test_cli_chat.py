import json
import stat
import types

import cli_fake
import pytest
from click.testing import CliRunner
from jinja2 import TemplateError
from rich.console import Console

from moe_offload.cli.answer_view import MarkdownView, PlainView
from moe_offload.cli.chat import DEFAULT_PROMPT
from moe_offload.cli.chat_session import ChatSession
from moe_offload.cli.main import cli
from moe_offload.cli.opening import exactness, residence
from moe_offload.cli.report import format_seconds
from moe_offload.cli.sampling import Sampling
from moe_offload.errors import ExpertReadError


class Conversation:
    """A session whose user says ``lines``; what is shown is kept."""

    def __init__(self, tmp_path, replies=None, **options):
        self.path = tmp_path / "shown.txt"
        self.model = cli_fake.FakeModel(replies or [["Hello", " there."]], **options)
        self.file = self.path.open("w+", encoding="utf-8")
        notes = Console(file=self.file, width=100)
        view = PlainView(self.file, thinking=True)
        self.session = ChatSession(self.model, "test/model", Sampling(64), view, notes)

    def say(self, *lines):
        waiting = iter(lines)

        def read():
            for line in waiting:
                if isinstance(line, type):
                    raise line
                return line
            raise EOFError

        self.session.run(read)
        self.file.flush()
        return self.path.read_text()


@pytest.fixture
def converse(tmp_path):
    made = []

    def make(*args, **options):
        made.append(Conversation(tmp_path, *args, **options))
        return made[-1]

    yield make
    for conversation in made:
        conversation.file.close()


def test_a_conversation_is_sent_back_without_thinking(converse):
    chat = converse([["<think>hm</think>One."], ["Two."]])
    shown = chat.say("first", "", "second")
    assert chat.model.asked == [
        [{"role": "user", "content": "first"}],
        [
            {"role": "user", "content": "first"},
            {"role": "assistant", "content": "One."},
            {"role": "user", "content": "second"},
        ],
    ]
    assert "\x1b[2mhm\x1b[22m" in shown
    assert shown.count("12.0 tok/s · first 0.2 s · 75% hits · 3.0 MiB read · 0.1 s stalled · 7 tokens") == 2


def test_a_template_that_opens_the_thinking(converse):
    tokenizer = cli_fake.FakeTokenizer("{{ '<think>' }}", prompt_end="<think>\n")
    chat = converse([["mull</think>Done."]], tokenizer=tokenizer)
    chat.say("go")
    assert (chat.session.turns[1].content, chat.session.turns[1].thinking) == ("Done.", "mull")


def test_system_and_reset(converse):
    chat = converse()
    shown = chat.say("/system", "/system Be brief.", "one", "/reset", "two", "/system off", "/exit", "never")
    assert chat.model.asked[1] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "two"}]
    assert len(chat.model.asked) == 2
    assert chat.session.system is None
    assert "No system prompt." in shown
    assert "System prompt: Be brief." in shown
    assert "Forgotten; the system prompt stays." in shown


def test_help_names_every_command(converse):
    shown = converse().say("/help")
    for name in ("/help", "/system TEXT", "/reset", "/save FILE", "/stats", "/exit", "Ctrl-C", "Alt+Enter"):
        assert name in shown


def test_stats(converse):
    shown = converse().say("/stats")
    assert "5 read, 7 written" in shown
    assert "40 asked for, 75% found in memory" in shown
    assert "6 experts, 4 of them used, 1 in vain; 50% of what was asked for was foreseen" in shown
    assert "3.0 MiB from the disk, 2.0 MiB copied to the GPU" in shown


def test_what_is_not_utf8_becomes_text(converse):
    chat = converse()
    chat.say("caf\udce9?")  # as Python reads a Latin-1 byte from a terminal
    assert chat.model.asked[0][-1]["content"].encode() == "caf\ufffd\ufffd\ufffd?".encode()


def test_saving_to_the_home_of_nobody_is_an_error_and_the_chat_goes_on(converse):
    shown = converse().say("hi", "/save ~nobody-of-that-name/talk.md", "/system still here")
    assert "Error: " in shown
    assert "still here" in shown


def test_save_writes_json_and_markdown(converse, tmp_path):
    chat = converse([["<think>hm</think>One."]])
    shown = chat.say("/system Be brief.", "first", f"/save {tmp_path}/talk.json", f"/save {tmp_path}/my talk.md")
    assert json.loads((tmp_path / "talk.json").read_text()) == {
        "model": "test/model",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "first"},
            {"role": "assistant", "content": "One.", "thinking": "hm"},
        ],
    }
    written = (tmp_path / "my talk.md").read_text()
    assert written.startswith("# A conversation with test/model\n\n## System\n\nBe brief.\n\n## User\n\nfirst\n")
    assert "<summary>Thinking</summary>\n\nhm" in written
    assert shown.replace("\n", "").count("Saved ") == 2


def test_save_does_not_overwrite_unasked(converse, tmp_path):
    path = tmp_path / "talk.md"
    path.write_text("precious")
    chat = converse()
    shown = chat.say("hello", f"/save {path}")
    assert path.read_text() == "precious"
    assert "is there already; /save! " in shown.replace("\n", " ")
    shown = chat.say(f"/save! {path}")
    assert "Hello there." in path.read_text()
    assert "Replaced" in shown


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/sav x", "There is no /sav; did you mean /save? /help lists the commands."),
        ("/q", "There is no /q; /help lists the commands."),
        ("/save", "Say where: /save FILE.md or /save FILE.json"),
        ("/save /nowhere/at/all.md", "Error: [Errno 2] No such file or directory: '/nowhere/at/all.md'"),
    ],
)
def test_mistakes_are_told_and_the_chat_goes_on(converse, line, message):
    chat = converse()
    assert message in chat.say(line, "hello")
    assert len(chat.model.asked) == 1


def test_a_path_is_a_message_and_not_a_command(converse):
    chat = converse()
    chat.say("/etc/hosts holds what?")
    assert chat.model.asked == [[{"role": "user", "content": "/etc/hosts holds what?"}]]


def test_an_error_is_shown_and_its_message_taken_back(converse):
    chat = converse([ExpertReadError("expert 3 of layer 1: the disk failed"), ["Fine."]])
    shown = chat.say("first", "second")
    assert "Error: expert 3 of layer 1: the disk failed" in shown
    assert chat.model.asked[1] == [{"role": "user", "content": "second"}]


def test_a_template_that_refuses_is_an_error_of_one_line(converse):
    chat = converse([TemplateError("roles must alternate"), ["Fine."]])
    shown = chat.say("/system Be brief.", "first", "second")
    expected = "Error: the model's chat template refuses this conversation: roles must alternate; try it without a"
    assert expected in shown.replace("\n", " ")
    assert len(chat.model.asked) == 2


def test_ctrl_c_at_the_prompt_asks_again(converse):
    chat = converse()
    chat.say(KeyboardInterrupt, "hello", KeyboardInterrupt)
    assert len(chat.model.asked) == 1


def test_an_answer_cut_short_while_thinking_says_so(converse):
    chat = converse([["<think>and then"]])
    chat.session.sampling = Sampling(7)
    shown = chat.say("hello")
    assert "7 tokens (the limit" in shown
    assert "All 7 tokens went into thinking" in shown
    assert chat.session.turns == []


def run_chat(monkeypatch, *args, stdin="", model=None):
    model = model or cli_fake.FakeModel()
    loader = cli_fake.install(monkeypatch, model)
    return CliRunner().invoke(cli, ["chat", *args], input=stdin), model, loader


def test_piped_one_message_is_answered(monkeypatch):
    result, model, loader = run_chat(
        monkeypatch, "some/model", "--ram", "12GiB", "--context", "512", stdin="Hi!\nYou?\n"
    )
    assert result.exit_code == 0, result.output
    assert result.stdout == "Hello there.\n"
    assert model.asked == [[{"role": "user", "content": "Hi!\nYou?"}]]
    assert loader.loaded == [("some/model", {"ram": "12GiB", "context_tokens": 512})]
    for told in (
        "packing: 1.0 KiB in 0 ms",
        "slots 2 of 5 per layer",
        "model     some/model",
        "experts nf4, the rest source",
        "answers   exact at nf4: identical to the fully resident model",
        "experts   40% kept in RAM, the rest streamed from disk",
        "kernels   fake kernels",
        "greedy: always the likeliest token",
        "> Hi!",
        "12.0 tok/s",
    ):
        assert told in result.stderr
    assert model.closed


def test_without_model_and_input_the_demo_answers_a_question_of_ours(monkeypatch):
    result, model, loader = run_chat(monkeypatch)
    assert result.exit_code == 0, result.output
    assert loader.loaded == [("/demo", {"ram": "300MiB"})]
    assert model.asked == [[{"role": "user", "content": DEFAULT_PROMPT}]]
    assert "the built-in demo" in result.stderr


def test_the_budget_of_the_demo_can_be_chosen(monkeypatch):
    assert run_chat(monkeypatch, "--ram", "80%")[2].loaded == [("/demo", {"ram": "80%"})]
    loaded = run_chat(monkeypatch, "--device", "cuda", "--ram", "8GiB")[2].loaded
    assert loaded == [("/demo", {"device": "cuda", "vram": "cuda", "ram": "8GiB"})]


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--format", "nf4"], "--format"),
        (["--dense-format", "int8", "--revision", "main"], "--dense-format and --revision"),
    ],
)
def test_a_pack_cannot_be_asked_for_in_another_format(monkeypatch, tmp_path, args, named):
    (tmp_path / "pack.json").write_text("{}")
    result, _, loader = run_chat(monkeypatch, str(tmp_path), *args)
    assert result.exit_code == 1
    assert f"Error: {tmp_path} is a pack already, which {named} cannot change" in result.stderr
    assert not loader.loaded


def test_piped_the_thinking_stays_out_of_the_output(monkeypatch):
    result, _, _ = run_chat(monkeypatch, model=cli_fake.FakeModel([["<think>hm</think>", "Yes."]]))
    assert result.stdout == "Yes.\n"


RECOMMENDED = types.SimpleNamespace(do_sample=True, temperature=0.6, top_p=0.95, top_k=20)


@pytest.mark.parametrize(
    ("asked", "recommended", "expected", "told"),
    [
        ({}, None, {}, "greedy: always the likeliest token"),
        (
            {},
            RECOMMENDED,
            {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
            "sampled, temperature 0.6, top-p 0.95, top-k 20",
        ),
        ({"temperature": 0}, RECOMMENDED, {"temperature": 0}, "greedy: always the likeliest token"),
        ({"top_k": 5}, RECOMMENDED, {"temperature": 1.0, "top_k": 5}, "sampled, temperature 1, top-k 5"),
        ({"seed": 3}, RECOMMENDED, {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "seed": 3}, "seed 3"),
        ({}, types.SimpleNamespace(do_sample=False, temperature=0.6), {}, "greedy"),
    ],
)
def test_what_was_asked_goes_before_what_the_model_recommends(asked, recommended, expected, told):
    sampling = Sampling(9, **asked).over(recommended)
    assert sampling.arguments() == {"max_new_tokens": 9} | expected
    assert told in str(sampling)


MARKDOWN = """# Title

A *paragraph* with <b>html</b> and [a link](https://example.org).

1. one
2. two

```python
print("hello")

print("again")
```

| a | b |
| - | - |
| 1 | 2 |

The\u2028end \x1b[31mcalmly\x07.
"""


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_markdown_is_the_same_however_it_arrives(tmp_path, step):
    from moe_offload.cli.thinking import Piece

    def shown(step):
        with (tmp_path / f"{step}.txt").open("w+", encoding="utf-8") as file:
            console = Console(file=file, width=60, height=12, force_terminal=False)
            with MarkdownView(console) as view:
                view.show(Piece("thinking", "let me see\n\nyes"))
                for start in range(0, len(MARKDOWN), step):
                    view.show(Piece("answer", MARKDOWN[start : start + step]))
            file.seek(0)
            return [line.rstrip() for line in file.read().splitlines()]

    lines = shown(step)
    assert lines == shown(10_000)
    assert lines[:3] == ["let me see", "", "yes"]
    text = "\n".join(lines)
    assert "\n\n\n" not in text
    assert '\n\n print("hello")\n\n print("again")\n\n' in text
    for part in (
        "Title",
        "<b>html</b>",
        "https://example.org",
        "1 one",
        "2 two",
        'print("again")',
        "[31mcalmly.",
    ):
        assert part in text


def test_the_history_is_kept_and_private(tmp_path):
    from moe_offload.cli.line_editor import _history

    history = _history(tmp_path / "home" / "chat_history")
    history.append_string("a message\nof two lines")
    assert list(_history(tmp_path / "home" / "chat_history").load_history_strings()) == ["a message\nof two lines"]
    assert stat.S_IMODE((tmp_path / "home" / "chat_history").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (cli_fake.FakePlan("cpu", 0.15), "15% kept in RAM, the rest streamed from disk"),
        (cli_fake.FakePlan("cpu", 1.0), "all kept in RAM"),
        (cli_fake.FakePlan("cuda", 0.15, 0.5), "15% kept in VRAM, 50% in RAM, the rest streamed from disk"),
        (cli_fake.FakePlan("cuda", 0.15), "15% kept in VRAM, the rest streamed from disk"),
    ],
)
def test_the_banner_says_what_is_where(plan, expected):
    assert residence(plan) == expected


@pytest.mark.parametrize(
    ("formats", "expected"),
    [
        (("source", "source"), "exact: the checkpoint's own numbers"),
        (("int8", "source"), "exact at int8: identical to the fully resident model in this format"),
        (("source", "nf4"), "exact at nf4: identical to the fully resident model in this format"),
    ],
)
def test_the_banner_says_how_exact_the_answers_are(formats, expected):
    assert exactness(cli_fake.FakeManifest(*formats), "copy") == expected


@pytest.mark.parametrize(
    ("formats", "expected"),
    [
        (("source", "source"), "exact to rounding with the checkpoint's own numbers: "),
        (("nf4", "source"), "exact to rounding at nf4: "),
    ],
)
def test_the_banner_says_that_the_cpu_rounds_otherwise(formats, expected):
    told = exactness(cli_fake.FakeManifest(*formats), "split")
    assert told == expected + "the CPU computes some experts (--miss-path split)"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.0, "0 ms"), (0.084, "84 ms"), (3.21, "3.2 s"), (59.6, "60 s"), (250, "4 min 10 s"), (7260, "2 h 1 min")],
)
def test_durations_as_people_read_them(seconds, expected):
    assert format_seconds(seconds) == expected
