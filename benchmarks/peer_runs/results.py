"""What came out: medians over rounds, ratios within a round, bounds, and the tables."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peer_runs.cases import Case, Entry

if TYPE_CHECKING:
    from moe_offload.offload.bench.report import MachineRates

MIB = 1 << 20


@dataclass
class EntryResult:
    """One entry of a case; a round's figures as its child printed them, None where it failed."""

    entry: Entry
    file_bytes: int
    num_weights: int
    rounds: list[dict[str, Any] | None] = field(default_factory=list)
    failure: str = ""

    @property
    def bits(self) -> float:
        """Bits a weight on disk, everything counted."""
        return 8 * self.file_bytes / self.num_weights

    def tokens_per_s(self) -> list[float | None]:
        """Of every round: tokens over the time of all of them."""
        return [None if one is None else len(one["step_s"]) / sum(one["step_s"]) for one in self.rounds]

    def prefill_tokens_per_s(self, prefill_tokens: int) -> list[float | None]:
        """Of every round."""
        return [
            None if not one or not one.get("prefill_s") else prefill_tokens / one["prefill_s"] for one in self.rounds
        ]

    def median(self, key: str) -> float | None:
        """Of one of the figures, over the rounds that have it."""
        values = [one[key] for one in self.rounds if one is not None and one.get(key) is not None]
        return statistics.median(values) if values else None


@dataclass
class CaseResult:
    """A case with all its entries and the rates measured around it; ``disk_limit``: the bytes a second allowed it."""

    case: Case
    entries: list[EntryResult]
    rates: "MachineRates | None" = None
    disk_limit: int | None = None

    def bound(self, result: EntryResult) -> float | None:
        """Tokens a second that the machine allows: 1 / max(bytes missed / disk, bytes read from memory / memory).

        Of what this engine has missed; where it does not count that, what it has read.
        """
        missed_bytes = _first(result.median("missed_bytes"), result.median("read_bytes"))
        if self.rates is None or missed_bytes is None:
            return None
        active_bytes = self.case.shape.active_weights * result.bits / 8
        return 1 / max(missed_bytes / self.rates.disk_bytes_per_s, active_bytes / self.rates.memory_bytes_per_s)

    def prefill_bound(self, result: EntryResult) -> float | None:
        """The same for a prompt: num_tokens / max(bytes missed / disk, operations / rate of bf16 products)."""
        missed_bytes = _first(result.median("prefill_missed_bytes"), result.median("prefill_read_bytes"))
        if self.rates is None or missed_bytes is None or self.rates.matrix_ops_per_s is None:
            return None
        shape, num_tokens = self.case.shape, self.case.prefill_tokens
        num_operations = 2 * num_tokens * (shape.active_weights - shape.vocab_size * shape.hidden_size)
        return num_tokens / max(
            missed_bytes / self.rates.disk_bytes_per_s, num_operations / self.rates.matrix_ops_per_s
        )


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _reached(speeds: Sequence[float | None], bound: float | None) -> float | None:
    """The median share of the bound."""
    present = [speed for speed in speeds if speed is not None]
    return statistics.median(present) / bound if present and bound else None


def _ratio(values: Sequence[float | None], others: Sequence[float | None]) -> float | None:
    """The median of the ratios within a round."""
    ratios = [mine / its for mine, its in zip(values, others, strict=True) if mine is not None and its is not None]
    return statistics.median(ratios) if ratios else None


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _speed(values: Sequence[float | None]) -> str:
    present = sorted(value for value in values if value is not None)
    if not present:
        return "-"
    middle = statistics.median(present)
    return f"{middle:.2f}" if len(present) == 1 else f"{middle:.2f} ({present[0]:.2f}-{present[-1]:.2f})"


def decode_table(results: Sequence[CaseResult]) -> str:
    """Decoding, all cases."""
    head = ["case", "engine", "weights", "bits", "slots", "hits", "tok/s", "x first", "read a token, MiB", "peak, MiB"]
    head += ["bound, tok/s", "of bound"]
    lines = [_line(head), _line(["---"] * len(head))]
    for result in results:
        first = result.entries[0].tokens_per_s()
        for one in result.entries:
            speeds = one.tokens_per_s()
            bound, read_bytes, peak_bytes = result.bound(one), one.median("read_bytes"), one.median("peak_bytes")
            lines.append(
                _line(
                    [
                        f"{result.case.shape.name}, {result.case.title}",
                        one.entry.label,
                        one.entry.weights,
                        f"{one.bits:.2f}",
                        _text(one.median("share"), ".0%"),
                        _text(one.median("hit_ratio"), ".0%"),
                        f"failed: {one.failure}" if one.failure else _speed(speeds),
                        _text(_ratio(speeds, first), ".2f"),
                        _text(None if read_bytes is None else read_bytes / MIB, ".0f"),
                        _text(None if peak_bytes is None else peak_bytes / MIB, ".0f"),
                        _text(bound, ".2f"),
                        _text(_reached(speeds, bound), ".0%"),
                    ]
                )
            )
    return "\n".join(lines)


def prefill_table(results: Sequence[CaseResult]) -> str:
    """Reading a prompt, the cases that measure it; empty without any."""
    head = ["case", "engine", "weights", "prompt, tokens", "tok/s", "x first", "read, MiB", "bound, tok/s", "of bound"]
    lines = [_line(head), _line(["---"] * len(head))]
    for result in results:
        num_tokens = result.case.prefill_tokens
        if not num_tokens:
            continue
        first = result.entries[0].prefill_tokens_per_s(num_tokens)
        for one in result.entries:
            speeds, read_bytes = one.prefill_tokens_per_s(num_tokens), one.median("prefill_read_bytes")
            name = f"{result.case.shape.name}, {result.case.title}"
            ratio = _text(_ratio(speeds, first), ".2f")
            read = _text(None if read_bytes is None else read_bytes / MIB, ".0f")
            bound = result.prefill_bound(one)
            cells = [name, one.entry.label, one.entry.weights, str(num_tokens), _speed(speeds), ratio, read]
            lines.append(_line([*cells, _text(bound, ".1f"), _text(_reached(speeds, bound), ".0%")]))
    return "\n".join(lines) if len(lines) > 2 else ""


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
