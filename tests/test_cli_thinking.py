import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_offload.cli.thinking import ThinkingSplitter, prompt_opens_thinking

CASES = {
    "no thinking": ("Just <b>this</b>.", "", "Just <b>this</b>."),
    "think": ("<think>\nfirst\n\nsecond</think>\n\nThe answer.", "first\n\nsecond", "The answer."),
    "mistral": ("[THINK]well[/THINK]Yes", "well", "Yes"),
    "gpt-oss": (
        "<|channel|>analysis<|message|>We must.<|end|><|start|>assistant<|channel|>final<|message|>Hi!<|return|>",
        "We must.",
        "Hi!",
    ),
    "gpt-oss commentary": (
        "<|channel|>commentary to=f <|constrain|>json<|message|>{}<|end|>"
        "<|start|>assistant<|channel|>final<|message|>A",
        "{}",
        "A",
    ),
    "never closed": ("<think>on and on </thi", "on and on </thi", ""),
    "an answer about tags": ("Write <think> and </think> around it.", "", "Write <think> and </think> around it."),
    "a lone beginning": ("<thi", "", "<thi"),
    "less than": ("<3 you", "", "<3 you"),
    "empty": ("", "", ""),
    "twice": ("<think>a</think> <think>b</think> c", "ab", "c"),
}


def split(chunks: list[str], **options: bool) -> tuple[str, str]:
    splitter = ThinkingSplitter(**options)
    pieces = [piece for chunk in chunks for piece in splitter.feed(chunk)] + list(splitter.finish())
    assert all(piece.text for piece in pieces)
    return tuple("".join(piece.text for piece in pieces if piece.kind == kind) for kind in ("thinking", "answer"))


@pytest.mark.parametrize("name", CASES)
@given(data=st.data())
def test_any_way_of_breaking_the_stream_gives_the_same(name, data):
    text, thinking, answer = CASES[name]
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=len(text))))
    chunks = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert split(chunks) == (thinking, answer)


def test_a_prompt_that_opens_the_block():
    assert split(["I mull", "</think>", "Done"], starts_thinking=True) == ("I mull", "Done")
    assert prompt_opens_thinking("<|assistant|>\n<think>\n")
    assert not prompt_opens_thinking("<|assistant|>\n<think>\n\n</think>\n")


def test_an_answer_is_not_held_back():
    splitter = ThinkingSplitter()
    assert [piece.text for piece in splitter.feed("Hello")] == ["Hello"]
    assert [piece.text for piece in splitter.feed(" <")] == [" <"]
