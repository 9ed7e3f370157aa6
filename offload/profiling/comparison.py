"""Two reports beside each other: what was set differently, what came out differently, and whether that means much."""

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from moe_offload.offload.profiling import figures
from moe_offload.offload.profiling.report import ProfileReport
from moe_offload.offload.profiling.run_facts import RunFacts

CAVEAT = (
    "One run each does not tell how much whole runs vary (other programs, what the disk holds in its cache, clock "
    "rates): run both again, in turn, before believing a difference of a few percent."
)
_PARTS = ("dense_s", "router_s", "wait_s", "experts_s", "other_s")
_MOST_LAYERS = 5


@dataclass(frozen=True)
class Setting:
    """What differed before the runs began."""

    name: str
    a: str
    b: str


@dataclass(frozen=True)
class Change:
    """A figure of both runs, as numbers and as text; ``change`` is b / a - 1, None without both or where a is 0."""

    name: str
    a: float | None
    b: float | None
    text_a: str
    text_b: str

    @property
    def change(self) -> float | None:
        return None if self.a is None or self.b is None or not self.a else self.b / self.a - 1


@dataclass(frozen=True)
class StepDifference:
    """How much longer a decode step of b is, as a share of a's, and two standard errors of that."""

    share: float
    two_errors: float

    @property
    def is_clear(self) -> bool:
        """Whether it is more than the steps of one run vary."""
        return abs(self.share) > self.two_errors

    def __str__(self) -> str:
        verdict = "more than its steps vary" if self.is_clear else "within what its steps vary, perhaps chance"
        return f"A decode step takes {self.share:+.1%} in b, give or take {self.two_errors:.1%}: {verdict}."


@dataclass(frozen=True)
class Comparison:
    """``notes`` say what makes the runs hard to compare; ``layers`` are those whose hit ratio differs most."""

    settings: tuple[Setting, ...]
    figures: tuple[Change, ...]
    layers: tuple[Change, ...]
    step: StepDifference | None
    notes: tuple[str, ...]


def compare(a: ProfileReport, b: ProfileReport) -> Comparison:
    """What differs between two runs."""
    return Comparison(
        tuple(
            Setting(name, x, y) for (name, x), (_, y) in zip(_settings(a.run), _settings(b.run), strict=True) if x != y
        ),
        tuple(_figures(a, b)),
        _layers(a, b),
        _step_difference(a, b),
        tuple(_notes(a, b)),
    )


def _settings(run: RunFacts) -> Iterator[tuple[str, str]]:
    for name in ("model", "format", "dense_format", "device", "policy", "prefetch", "miss_path", "context_tokens"):
        yield name.replace("_", " "), str(getattr(run, name))
    for name in ("ram", "vram"):
        yield name, figures.size(getattr(run, f"{name}_bytes"))
    layers = len(run.num_experts)
    yield "experts", f"{layers} layers of {max(run.num_experts)}, {run.top_k} a token"
    yield "slots a layer", figures.NONE if run.num_slots is None else f"{sum(run.num_slots) / layers:.4g}"
    yield "tokens", f"{run.prefill_tokens} read, {run.decode_tokens} decoded"
    yield "rate of memory", figures.rate(run.rates.memory_bytes_per_s)
    yield "rate of the disk", figures.rate(run.rates.disk_bytes_per_s)
    yield "rate of PCIe", figures.rate(run.rates.pcie_bytes_per_s)
    for name in ("cpu", "cores", "threads", "kernels", "gpu"):
        yield name, str(getattr(run.machine, name, None))
    yield "versions", ", ".join(f"{package} {version}" for package, version in sorted(run.versions.items()))


def _figures(a: ProfileReport, b: ProfileReport) -> Iterator[Change]:
    def change(name: str, write: Any, x: float | None, y: float | None) -> Change:
        return Change(name, x, y, write(x), write(y))

    def share(value: float | None) -> str:
        return figures.percent(value, 1)

    x, y = a.header, b.header
    yield change("decoding", figures.speed, x.tokens_per_s, y.tokens_per_s)
    yield change("median step", figures.seconds, x.median_step_s, y.median_step_s)
    yield change("time to first token", figures.seconds, x.time_to_first_token_s, y.time_to_first_token_s)
    yield change("hits in decode", share, x.hit_ratio_decode, y.hit_ratio_decode)
    yield change("hits in prefill", share, x.hit_ratio_prefill, y.hit_ratio_prefill)
    yield change("from disk for a token", figures.size, x.disk_bytes_per_token, y.disk_bytes_per_token)
    yield change("over PCIe for a token", figures.size, x.pcie_bytes_per_token, y.pcie_bytes_per_token)
    links = [report.link.decode if report.link else None for report in (a, b)]
    yield change("link used", share, *(link.use if link else None for link in links))
    yield change("link busy", share, *(link.busy_share if link else None for link in links))
    yield change("stalled", share, x.stall_share, y.stall_share)
    bounds = [header.bound for header in (x, y)]
    yield change("bound", figures.speed, *(bound.tokens_per_s if bound else None for bound in bounds))
    yield change("of the bound", share, *(bound.share if bound else None for bound in bounds))
    splits = [report.timing.decode if report.timing else None for report in (a, b)]
    for part in _PARTS:
        each = [getattr(split, part) / split.steps if split else None for split in splits]
        yield change(f"{part.removesuffix('_s')}, a step", figures.seconds, *each)
    recalls = [report.prediction.recall[0] if report.prediction else None for report in (a, b)]
    yield change("foreseen", share, *recalls)
    wasted = [report.prediction.wasted_bytes if report.prediction else None for report in (a, b)]
    yield change("read in vain", figures.size, *wasted)


def _layers(a: ProfileReport, b: ProfileReport) -> tuple[Change, ...]:
    changes = [
        Change(
            f"layer {x.layer}",
            x.hit_ratio,
            y.hit_ratio,
            figures.percent(x.hit_ratio, 1),
            figures.percent(y.hit_ratio, 1),
        )
        for x, y in zip(a.layers, b.layers, strict=False)
    ]
    known = [change for change in changes if change.a is not None and change.b is not None and change.a != change.b]
    known.sort(key=lambda change: -abs((change.b or 0.0) - (change.a or 0.0)))
    return tuple(known[:_MOST_LAYERS])


def _step_difference(a: ProfileReport, b: ProfileReport) -> StepDifference | None:
    means, errors = zip(*(_mean_step(report) for report in (a, b)), strict=True)
    if None in means or None in errors:
        return None
    return StepDifference(means[1] / means[0] - 1, 2 * math.hypot(errors[0], errors[1]) / means[0])


def _mean_step(report: ProfileReport) -> tuple[float | None, float | None]:
    """Mean time of a decode step and its standard error; steps in a row resemble each other and count for less.

    Of n values with a correlation of r from one to the next, n (1 - r) / (1 + r) count (a first-order process).
    """
    steps = report.steps
    if steps.wall_s is None:
        return None, None
    columns = zip(steps.phase, steps.wall_s, steps.num_steps, strict=True)
    values = [wall_s / num_steps for phase, wall_s, num_steps in columns if phase == "decode"]
    if len(values) < 3:
        return None, None
    mean, variance = statistics.fmean(values), statistics.variance(values)
    products = [(x - mean) * (y - mean) for x, y in pairwise(values)]
    correlation = min(0.99, max(0.0, statistics.fmean(products) / variance)) if variance else 0.0
    counting = max(2.0, len(values) * (1 - correlation) / (1 + correlation))
    return mean, math.sqrt(variance / counting)


def _notes(a: ProfileReport, b: ProfileReport) -> Iterator[str]:
    if a.run.model != b.run.model:
        yield f"These are runs of two models, {a.run.model} and {b.run.model}."
    elif a.run.num_experts != b.run.num_experts:
        yield "The models have other numbers of layers or experts: layers are not the same layers."
    texts = [[(s.name, s.prompt_tokens, s.decode_tokens) for s in report.run.sequences] for report in (a, b)]
    if texts[0] != texts[1]:
        yield "They did not read and write the same amounts of text: hits and speed depend on it."
    if a.run.machine is not None and b.run.machine is not None and a.run.machine.cpu != b.run.machine.cpu:
        yield "They ran on different machines."
    if a.usage.decode_uses == b.usage.decode_uses and a.run.decode_tokens:
        yield "Both decoded along the same experts."
