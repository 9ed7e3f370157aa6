"""``moe-offload generate``: one prompt, one answer; for scripts and pipes."""

import io
import json
import sys
from typing import Any

import click

from moe_offload.cli.options import MODEL, TEXT, given, load_options, sampling_options, trace_options
from moe_offload.cli.user_text import piped_text
from moe_offload.errors import ConfigError


@click.command()
@click.argument("model", type=MODEL)
@click.option("-p", "--prompt", type=TEXT, help="What to answer or complete; by default what is piped in.")
@click.option("--system", type=TEXT, help="System prompt: how the model should behave.")
@click.option(
    "--chat-template/--raw",
    default=None,
    help="Put the prompt as a message in a chat, or complete it as it is.  [default: as a message, if the model chats]",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Longest answer.")
@sampling_options
@click.option(
    "--stream/--no-stream",
    default=None,
    help="Write the text as it comes, or at the end.  [default: as it comes, on a terminal]",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Write one JSON object: text, token counts, timings, cache figures."
)
@load_options
@trace_options
def generate(
    model: str,
    prompt: str | None,
    system: str | None,
    chat_template: bool | None,
    max_new_tokens: int,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int | None,
    stream: bool | None,
    as_json: bool,
    **load: Any,
) -> None:
    """Answer or complete one prompt.

    The text goes to the output, everything else to the error output. Ctrl-C ends the text early.
    """
    from moe_offload.cli.ranks import serve, serves_experts

    if serves_experts():
        serve(model, given(load))
        return
    prompt = prompt if prompt is not None else _piped_prompt()
    if system is not None and chat_template is False:
        raise click.UsageError("--system needs a chat; leave out --raw.")

    from rich.text import Text

    from moe_offload.cli.answer import chat_answer, raw_answer
    from moe_offload.cli.answer_view import PlainView
    from moe_offload.cli.consoles import notes_console
    from moe_offload.cli.opening import exactness, open_model
    from moe_offload.cli.report import cache_figures, report_line, timings
    from moe_offload.cli.sampling import Sampling

    notes = notes_console()
    with open_model(model, given(load), notes) as opened:
        generation_config = getattr(opened.model.model, "generation_config", None)
        sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed).over(generation_config)
        has_template = bool(getattr(opened.model.tokenizer, "chat_template", None))
        if (chat_template or system is not None) and not has_template:
            raise ConfigError(f"{model} has no chat template, so it cannot take messages; use --raw to complete a text")
        streaming = not as_json and (sys.stdout.isatty() if stream is None else stream)
        with PlainView(sys.stdout if streaming else io.StringIO(), thinking=streaming and sys.stdout.isatty()) as view:
            if has_template if chat_template is None else chat_template:
                messages = [{"role": "system", "content": system}] if system else []
                messages.append({"role": "user", "content": prompt})
                answer = chat_answer(opened.model, messages, sampling, view.show)
            else:
                answer = raw_answer(opened.model, prompt, sampling, view.show)
        run = opened.model.last_run
        if as_json:
            figures = {
                "model": opened.name,
                "format": opened.model.manifest.expert_format,
                "exactness": exactness(opened.model.manifest, opened.model.miss_path),
                "text": answer.text,
                "thinking": answer.thinking,
                "stopped": answer.stopped,
                "sampling": sampling.arguments(),
                "prompt_tokens": run.prompt_tokens if run else None,
                "new_tokens": run.new_tokens if run else None,
                "timings": {"load_s": opened.load_s} | (timings(run) if run else {}),
                "cache": cache_figures(run) if run else {},
                "load": opened.model.load_figures(context_tokens=run.prompt_tokens + run.new_tokens) if run else {},
            }
            _write(json.dumps(figures, ensure_ascii=False) + "\n")
        else:
            if not streaming:
                _write(answer.text + "\n")
            if run is not None:
                notes.print(Text(report_line(run, max_new_tokens=max_new_tokens), style="dim"))
        if answer.stopped:
            raise KeyboardInterrupt


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _piped_prompt() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise click.UsageError('Nothing to answer: give a prompt with -p "...", or pipe one in.')
    prompt = piped_text()
    if not prompt.strip():
        raise click.UsageError('The input is empty: pipe a prompt in, or give one with -p "...".')
    return prompt
