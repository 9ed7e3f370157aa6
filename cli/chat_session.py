"""A conversation: who said what, and how the next answer is made and shown."""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Console
from rich.text import Text

from moe_offload.cli.answer import Answer, chat_answer
from moe_offload.cli.answer_view import AnswerView
from moe_offload.cli.model_api import LanguageModel
from moe_offload.cli.report import report_line
from moe_offload.cli.sampling import Sampling
from moe_offload.cli.slash_commands import COMMANDS
from moe_offload.cli.transcript import Turn
from moe_offload.cli.user_text import mended
from moe_offload.errors import MoeOffloadError, PeerLostError

_COMMAND = re.compile(r"/([a-z]+)(!?)(?:\s+(.*))?", re.DOTALL)


@dataclass
class ChatSession:
    """Talks with ``model`` until the user leaves. Notes go to ``notes``, answers to ``view``."""

    model: LanguageModel
    model_name: str
    sampling: Sampling
    view: AnswerView
    notes: Console
    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    over: bool = False

    def run(self, read_message: Callable[[], str]) -> None:
        """Read and answer until /exit or the end of the input; errors are shown, and the conversation goes on."""
        while not self.over:
            try:
                message = mended(read_message()).strip()
            except KeyboardInterrupt:
                continue
            except EOFError:
                return
            try:
                if message and not self._command(message):
                    answer = self.answer(message)
                    self.notes.print()
                    if answer.is_last:
                        self.notes.print(Text("torchrun was told to end, and ends all ranks", style="yellow"))
                        self.over = True
            except PeerLostError:
                raise
            except (MoeOffloadError, OSError) as error:
                self.notes.print(Text(f"Error: {error}", style="red"))

    def answer(self, message: str) -> Answer:
        """Send ``message`` and show the answer as it comes.

        A message that got no answer is taken back, so that the two sides keep taking turns.
        """
        messages = [*self.messages(), {"role": "user", "content": message}]
        with self.view:
            answer = chat_answer(self.model, messages, self.sampling, self.view.show)
        if answer.text:
            self.turns += [Turn("user", message), Turn("assistant", answer.text, answer.thinking)]
        self._note_run(answer)
        return answer

    def messages(self) -> list[dict[str, str]]:
        """The conversation so far, as chat templates take it: without thinking."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + [{"role": turn.role, "content": turn.content} for turn in self.turns]

    def _note_run(self, answer: Answer) -> None:
        run, limit = self.model.last_run, self.sampling.max_new_tokens
        parts = ["stopped"] if answer.stopped else []
        if run is not None:
            parts.append(report_line(run, max_new_tokens=limit))
        self.notes.print(Text(" · ".join(parts), style="dim"))
        if answer.thinking and not answer.text and run is not None and run.new_tokens >= limit:
            advice = f"All {limit} tokens went into thinking; give it more with --max-new-tokens."
            self.notes.print(Text(advice, style="yellow"))

    def _command(self, message: str) -> bool:
        """Run ``message`` if it is a command; False if it is something to say."""
        match = _COMMAND.fullmatch(message)
        if match is None:
            return False
        name, force, rest = match.groups()
        if name in COMMANDS:
            COMMANDS[name].run(self, (rest or "").strip(), bool(force))
            return True
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f"did you mean /{near[0]}? " if near else ""
        self.notes.print(Text(f"There is no /{name}; {meant}/help lists the commands.", style="yellow"))
        return True
