"""The text of docs/benchmarks.md between the markers of the comparison: what was measured, then the tables."""

import os
from collections.abc import Sequence

from peer_runs.results import CaseResult, decode_table, prefill_table


def document(results: Sequence[CaseResult]) -> str:
    """The text between the markers."""
    from moe_offload.quant import backend_name

    versions = {one["version"] for case in results for entry in case.entries for one in entry.rounds if one}
    lines = [f"{os.cpu_count()} cores, kernels `{backend_name()}`; {'; '.join(sorted(versions))}."]
    lines += ["", *(f"- {_conditions(result)}" for result in results), "", decode_table(results)]
    if prefill := prefill_table(results):
        lines += ["", prefill]
    return "\n".join(["", *lines, ""])


def _conditions(result: CaseResult) -> str:
    """How often a case was run, and what the machine gave it."""
    rounds = [one for entry in result.entries for one in entry.rounds if one]
    num_rounds = max(len(entry.rounds) for entry in result.entries)
    num_tokens = max((len(one["step_s"]) for one in rounds), default=0)
    text = f"{result.case.shape.name}, {result.case.title}: {_number(num_rounds, 'round')}"
    text += f" of {_number(num_tokens, 'token')}"
    if result.rates is not None:
        disk, memory = result.rates.disk_bytes_per_s / 1e9, result.rates.memory_bytes_per_s / 1e9
        limit = "" if result.disk_limit is None else f" under a limit of {result.disk_limit / 1e9:g}"
        text += f", disk read {disk:.2f} GB/s{limit}, memory read {memory:.1f} GB/s"
    return text


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def marker_name(results: Sequence[CaseResult]) -> str:
    """The markers that these results go between: those with a limited disk have their own."""
    return "peers" if all(result.disk_limit is None for result in results) else "peers-slow-disk"


def between_markers(text: str, table: str, name: str) -> str:
    """``text`` with ``table`` between its two markers; ValueError where it has none."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the document has no pair of markers {begin} and {end}")
    return f"{text[: text.index(begin)]}{begin}\n{table}\n{text[text.index(end) :]}"
