"""How each engine is run: its interpreter, its file of weights, its settings."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peer_runs.cases import Case, EngineName, Entry

HERE = Path(__file__).parent
_SCRIPTS = {"llama.cpp": "llama_child.py", "fastllm": "fastllm_child.py", "moe-offload": "our_child.py"}
_MODULES = {"llama.cpp": "llama_cpp", "fastllm": "ftllm", "moe-offload": "moe_offload"}
_INSTALL = {
    "llama.cpp": "python -m venv llama && llama/bin/pip install llama-cpp-python, then --llama-python llama/bin/python",
    "fastllm": "python -m venv ft && ft/bin/pip install --no-deps ftllm && ft/bin/pip install numpy pillow jinja2, "
    "then --ftllm-python ft/bin/python",
}
_FAILURE_CHARACTERS = 1500


class EngineError(Exception):
    """An engine did not run; the message has the end of what it said."""


@dataclass(frozen=True)
class Run:
    """How much is measured in one process of an engine."""

    seed: int
    threads: int
    decode_tokens: int
    warmup_tokens: int
    prompt_tokens: int
    prefetch: str
    timeout_s: float


def missing_reason(engine: EngineName, python: str) -> str | None:
    """Why an engine cannot run, with what to do about it; None where it can."""
    probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({_MODULES[engine]!r}) is None)"
    try:
        found = subprocess.run([python, "-c", probe], capture_output=True, check=False).returncode == 0
    except OSError as error:
        return f"{engine} is skipped, {python} does not run: {error}"
    if found:
        return None
    return f"{engine} is skipped, {python} has no module {_MODULES[engine]}; {_INSTALL[engine]}"


def settings(entry: Entry, case: Case, weights: Path, run: Run) -> dict[str, Any]:
    """What the child is told."""
    values = {
        "model": str(weights),
        "vocab_size": case.shape.vocab_size,
        "threads": entry.threads or run.threads,
        "seed": run.seed,
        "decode_tokens": run.decode_tokens,
        "warmup_tokens": run.warmup_tokens,
        "prompt_tokens": run.prompt_tokens,
        "prefill_tokens": case.prefill_tokens,
    }
    if entry.engine == "llama.cpp":
        return values | {"repack": entry.repack}
    if entry.engine == "fastllm":
        return values | {"cache_bytes": entry.cache_bytes}
    # Where nothing limits it: all the weights, and as much again for what is beside them.
    unlimited_bytes = 2 * case.shape.num_weights
    return values | {"limit_bytes": case.limit_bytes, "ram_bytes": unlimited_bytes, "prefetch": run.prefetch}


def measure(
    entry: Entry, python: str, values: dict[str, Any], timeout_s: float, launcher: Sequence[str] = ()
) -> dict[str, Any]:
    """The figures that the engine's child prints; ``launcher`` runs its command. `EngineError` where it fails."""
    return child_figures(entry.label, python, _SCRIPTS[entry.engine], values, timeout_s, launcher)


def child_figures(
    label: str,
    python: str,
    script: str,
    values: dict[str, Any],
    timeout_s: float,
    launcher: Sequence[str] = (),
) -> dict[str, Any]:
    """The last object of JSON that a script of this folder prints; ``label`` is what an `EngineError` calls it."""
    command = [*launcher, python, str(HERE / script), json.dumps(values)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout_s, text=True, errors="replace", check=False)
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"{label} took more than {timeout_s:.0f} s") from error
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        how = "was killed, most likely for memory" if done.returncode == -9 else f"ended with {done.returncode}"
        raise EngineError(f"{label} {how}\n{(done.stdout + done.stderr)[-_FAILURE_CHARACTERS:]}")
    figures: dict[str, Any] = json.loads(lines[-1])
    return figures


def default_pythons() -> dict[EngineName, str]:
    """The interpreter that this runs in, for all."""
    return {"llama.cpp": sys.executable, "fastllm": sys.executable, "moe-offload": sys.executable}
