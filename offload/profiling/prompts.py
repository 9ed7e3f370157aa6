"""What a profile runs: five kinds of text, or the user's own."""

from collections.abc import Callable
from dataclasses import dataclass

from moe_offload.errors import ConfigError

SEPARATOR = "---"


@dataclass(frozen=True)
class Prompt:
    """A text to go on with; ``chat``: as a message, where the model chats."""

    name: str
    text: str
    chat: bool = False


OnPrompt = Callable[[Prompt, int, int], None]
"""Called before each prompt, with its number from 1 and how many there are."""

BUILT_IN = (
    Prompt(
        "English",
        "The lighthouse had stood on the headland for two hundred years, and in all that time its lamp had failed only "
        "once. On that night, the keeper wrote in the log,",
    ),
    Prompt(
        "code",
        'def longest_common_subsequence(a: str, b: str) -> str:\n    """The longest string that can be obtained from '
        'both by deleting characters."""\n    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]\n',
    ),
    Prompt(
        "maths",
        "Problem: A train leaves at 9:40 and travels 252 km at 84 km/h. Another leaves the same station 45 minutes "
        "later and arrives at the same time. How fast is the second train?\n\nSolution: The first train takes",
    ),
    Prompt(
        "German",
        "Im Herbst des Jahres 1789 reiste ein junger Gelehrter von Jena nach Paris. In seinem Tagebuch beschreibt er "
        "die Stadt so:",
    ),
    Prompt("chat", "What should I look at when I buy a used bicycle? Answer in a short list.", chat=True),
)


def parse_prompts(text: str) -> tuple[Prompt, ...]:
    """The prompts in a text: parted by lines of ``---``, else one. `ConfigError` if there is none."""
    parts, lines = [], list[str]()
    for line in [*text.splitlines(), SEPARATOR]:
        if line.strip() == SEPARATOR:
            parts.append("\n".join(lines).strip("\n"))
            lines = []
        else:
            lines.append(line)
    found = [part for part in parts if part.strip()]
    if not found:
        raise ConfigError("there is no prompt to run: the text is empty")
    return tuple(Prompt(f"prompt {number}", part, chat=True) for number, part in enumerate(found, start=1))
