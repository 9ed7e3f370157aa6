"""Whether reality landed in the band, and what was off."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_offload.offload.forecast.band import Band
from moe_offload.offload.forecast.decode_time import decode_time
from moe_offload.offload.forecast.hit_ratio import hit_curve
from moe_offload.offload.forecast.machine import Machine
from moe_offload.offload.forecast.outcome import Outcome, read_outcomes
from moe_offload.offload.forecast.prompt_time import prompt_time

_SPEED, _HITS, _FIRST = "tokens a second", "hits in slots", "first token, s"


@dataclass(frozen=True)
class Line:
    """One figure beside its band."""

    what: str
    measured: float
    band: Band

    @property
    def inside(self) -> bool:
        """Whether it landed."""
        return self.band.contains(self.measured)

    @property
    def side(self) -> str:
        """Where it lies: how far off."""
        if self.inside:
            return "inside"
        end = self.band.low if self.measured < self.band.low else self.band.high
        word = "below" if self.measured < self.band.low else "above"
        return f"{abs(self.measured / end - 1):.0%} {word}" if end else word

    @property
    def measured_text(self) -> str:
        """For people."""
        return _text(self.what, self.measured)

    @property
    def band_text(self) -> str:
        """For people."""
        return f"{_text(self.what, self.band.low)} to {_text(self.what, self.band.high)}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"what": self.what, "measured": self.measured, "band": self.band.to_dict(), "inside": self.inside}


@dataclass(frozen=True)
class Check:
    """One run of a report: its figures, and why they are off where they are."""

    name: str
    lines: Sequence[Line]
    reason: str | None

    @property
    def inside(self) -> bool:
        """Whether the speed landed in its band."""
        return next(line.inside for line in self.lines if line.what == _SPEED)


@dataclass(frozen=True)
class Verdict:
    """All runs of a report."""

    heading: str
    checks: Sequence[Check]

    @property
    def sentence(self) -> str:
        """In one sentence, with the reasons for what was off."""
        inside = sum(check.inside for check in self.checks)
        found = f"{inside} of {len(self.checks)} runs landed in the band."
        reasons = dict.fromkeys(check.reason for check in self.checks if check.reason)
        return " ".join([found, *(f"{reason}." for reason in reasons)])

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: {"sentence", "runs": [{"name", "inside", "reason", "lines": [...]}]}."""
        return {
            "sentence": self.sentence,
            "runs": [
                {
                    "name": check.name,
                    "inside": check.inside,
                    "reason": check.reason,
                    "lines": [line.to_dict() for line in check.lines],
                }
                for check in self.checks
            ],
        }


def judge(path: Path, *, routing: str = "auto", given: Mapping[str, Any] | None = None) -> Verdict:
    """Hold the runs of a report against what would have been foretold of them.

    Rates are those that the report measured beside its runs; else those ``given`` (see `GivenMachine`), and what is
    missing is measured here.
    """
    outcomes = read_outcomes(path)
    machine = next((outcome.machine for outcome in outcomes if outcome.machine is not None), None)
    if machine is None:
        from moe_offload.offload.forecast.measured_machine import GivenMachine, machine_of
        from moe_offload.offload.home import home_dir

        read_bytes = max(layer.expert_bytes for outcome in outcomes for layer in outcome.load.layers)
        machine = machine_of(GivenMachine(**(given or {})), folder=home_dir(), read_bytes=read_bytes)
    checks = [check_outcome(outcome, outcome.machine or machine, routing) for outcome in outcomes]
    rates = f"memory {machine.memory.per_s / 1e9:.1f} GB/s, disk {machine.disk.per_s / 1e9:.2f} GB/s"
    return Verdict(f"{path.name}: {rates}", checks)


def check_outcome(outcome: Outcome, machine: Machine, routing: str = "auto") -> Check:
    """One run beside its bands."""
    load = outcome.load
    curve = hit_curve(
        (outcome.routing or "auto") if routing == "auto" else routing,
        model_type=outcome.model_type or "",
        num_experts=load.layers[0].num_experts,
        top_k=load.layers[0].top_k,
    )
    hit_ratio, reach = load.hit_ratio(curve), load.reach(curve)
    speed = Line(_SPEED, outcome.tokens_per_s, decode_time(load, machine, hit_ratio, reach).tokens_per_s)
    lines = [speed]
    if outcome.hit_ratio is not None:
        lines.append(Line(_HITS, outcome.hit_ratio, reach))
    if (prompt := outcome.prompt) is not None:
        first_s = prompt_time(
            load,
            machine,
            prompt_tokens=prompt.tokens,
            chunk_tokens=prompt.chunk_tokens,
            operations_per_token=prompt.operations_per_token,
        )
        lines.append(Line(_FIRST, prompt.time_to_first_token_s, first_s))
    return Check(outcome.name, lines, None if speed.inside else _reason(outcome, machine, speed, reach))


def _reason(outcome: Outcome, machine: Machine, speed: Line, reach: Band) -> str:
    """Why the speed is off: the hits where the true ones put it right, else the rates."""
    slower = speed.measured < speed.band.low
    if outcome.hit_ratio is not None:
        known = Band.exactly(min(1.0, max(0.0, outcome.hit_ratio)))
        corrected = decode_time(outcome.load, machine, known, known).tokens_per_s
        if corrected.contains(outcome.tokens_per_s):
            word = "less" if outcome.hit_ratio < reach.mid else "more"
            return (
                f"{outcome.name}: routing repeated {word} than the statistics have it ({outcome.hit_ratio:.0%} in "
                f"slots, {reach.low:.0%} to {reach.high:.0%} expected); plan with --routing trace:FILE of your own"
            )
    return f"{outcome.name}: the hits do not explain it; the machine was " + (
        "slower than its rates say, something else may have run beside it" if slower else "faster than its rates say"
    )


def _text(what: str, value: float) -> str:
    return f"{value:.0%}" if what == _HITS else f"{value:.2f}"
