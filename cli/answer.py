"""Gets one answer out of a model: streamed, its thinking told apart, ended early by Ctrl-C."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from moe_offload.cli.interrupt import stop_on_interrupt
from moe_offload.cli.model_api import LanguageModel
from moe_offload.cli.sampling import Sampling
from moe_offload.cli.thinking import Piece, ThinkingSplitter, prompt_opens_thinking
from moe_offload.errors import ConfigError

Show = Callable[[Piece], None]


@dataclass(frozen=True)
class Answer:
    """What the model said; ``stopped``: the user ended it; ``is_last``: and with it this process."""

    text: str
    thinking: str = ""
    stopped: bool = False
    is_last: bool = False


def chat_answer(model: LanguageModel, messages: list[dict[str, str]], sampling: Sampling, show: Show) -> Answer:
    """The next message of a conversation; each piece goes to ``show`` as it comes.

    Raises ConfigError if the model's chat template refuses the conversation.
    """
    from jinja2 import TemplateError

    try:
        splitter = ThinkingSplitter(starts_thinking=_template_opens_thinking(model.tokenizer, messages))
        texts = model.stream_chat(messages, **sampling.arguments())
    except TemplateError as error:
        advice = "; try it without a system prompt" if messages[0]["role"] == "system" else ""
        raise ConfigError(f"the model's chat template refuses this conversation: {error}{advice}") from error

    def pieces() -> Iterator[Piece]:
        for text in texts:
            yield from splitter.feed(text)
        yield from splitter.finish()

    answer = _collect(model, pieces(), show)
    return Answer(answer.text.strip(), answer.thinking.strip(), answer.stopped, answer.is_last)


def raw_answer(model: LanguageModel, prompt: str, sampling: Sampling, show: Show) -> Answer:
    """The continuation of ``prompt``, as it is."""
    texts = model.stream(prompt, **sampling.arguments())
    return _collect(model, (Piece("answer", text) for text in texts), show)


def _collect(model: LanguageModel, pieces: Iterable[Piece], show: Show) -> Answer:
    """Show and keep the pieces, until the stream ends."""
    said: dict[str, list[str]] = {"thinking": [], "answer": []}
    with stop_on_interrupt(model) as interruption:
        for piece in pieces:
            said[piece.kind].append(piece.text)
            show(piece)
            if interruption.asked:
                model.stop()  # once more: the first time may have come before the answer was under way
    return Answer("".join(said["answer"]), "".join(said["thinking"]), interruption.asked, interruption.is_the_end)


def _template_opens_thinking(tokenizer: Any, messages: list[dict[str, str]]) -> bool:
    """Whether the chat template itself opens a <think> block."""
    if "<think>" not in str(getattr(tokenizer, "chat_template", None)):
        return False
    return prompt_opens_thinking(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
