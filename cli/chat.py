"""``moe-offload chat``: a conversation on a terminal, or one answer to what is piped in."""

import sys
from typing import Any

import click

from moe_offload.cli.options import MODEL, TEXT, given, load_options, sampling_options, trace_options
from moe_offload.cli.user_text import piped_text

DEFAULT_PROMPT = "Explain in three sentences why the sky is blue."


@click.command()
@click.argument("model", type=MODEL, required=False)
@load_options
@trace_options
@sampling_options
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=1024, show_default=True, help="Longest answer.")
@click.option("--system", type=TEXT, help="System prompt: how the model should behave.")
@click.option("--plain", is_flag=True, help="Show answers as they are written, without Markdown.")
def chat(
    model: str | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int | None,
    max_new_tokens: int,
    system: str | None,
    plain: bool,
    **load: Any,
) -> None:
    """Talk with a model; with no MODEL, with the built-in demo.

    MODEL is a folder (a checkpoint or a pack) or a name on the Hugging Face hub. What is not a pack yet is packed
    first, once. In the chat, /help lists the commands. Ctrl-C stops an answer, Ctrl-D leaves.

    Where input or output is not a terminal, one message is read from the input (a question of our own if it is empty),
    the answer alone goes to the output, and everything else to the error output.
    """
    from moe_offload.cli.ranks import serve, serves_experts

    if serves_experts():
        serve(model, given(load))
        return

    from rich.text import Text

    from moe_offload.cli.answer_view import AnswerView, MarkdownView, PlainView
    from moe_offload.cli.chat_session import ChatSession
    from moe_offload.cli.consoles import notes_console
    from moe_offload.cli.opening import banner, open_model
    from moe_offload.cli.sampling import Sampling

    interactive = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    message = None if interactive else piped_text().strip() or DEFAULT_PROMPT
    notes = notes_console(stderr=not interactive)
    with open_model(model, given(load), notes_console()) as opened:
        generation_config = getattr(opened.model.model, "generation_config", None)
        sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed).over(generation_config)
        notes.print(banner(opened, sampling))
        notes.print()
        rich_view = interactive and not plain and notes.is_terminal and not notes.is_dumb_terminal
        view: AnswerView = MarkdownView(notes) if rich_view else PlainView(sys.stdout, thinking=interactive)
        session = ChatSession(opened.model, opened.name, sampling, view, notes, system)
        if message is not None:
            notes.print(Text(f"> {message}", style="dim"))
            if session.answer(message).stopped:
                raise KeyboardInterrupt
            return
        from moe_offload.cli.line_editor import message_reader
        from moe_offload.offload.home import home_dir

        session.run(message_reader(home_dir() / "chat_history"))
