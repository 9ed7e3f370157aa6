"""A conversation as a file: JSON by that suffix, Markdown otherwise."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Turn:
    """What one side said; ``thinking`` is not sent back to the model."""

    role: str
    content: str
    thinking: str = ""


def write_transcript(path: Path, turns: Sequence[Turn], *, model: str, overwrite: bool) -> bool:
    """Write the conversation; whether a file of that name was replaced. FileExistsError unless ``overwrite``."""
    text = _as_json(turns, model) if path.suffix.lower() == ".json" else _as_markdown(turns, model)
    replaced = path.exists()
    with path.open("w" if overwrite else "x", encoding="utf-8") as file:
        file.write(text)
    return replaced


def _as_json(turns: Sequence[Turn], model: str) -> str:
    messages = [{name: value for name, value in asdict(turn).items() if value} for turn in turns]
    return json.dumps({"model": model, "messages": messages}, ensure_ascii=False, indent=2) + "\n"


def _as_markdown(turns: Sequence[Turn], model: str) -> str:
    parts = [f"# A conversation with {model}"]
    for turn in turns:
        parts.append(f"## {turn.role.capitalize()}")
        if turn.thinking:
            parts.append(f"<details><summary>Thinking</summary>\n\n{turn.thinking}\n\n</details>")
        parts.append(turn.content)
    return "\n\n".join(parts) + "\n"
