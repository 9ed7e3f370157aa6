"""What would help most: for each change, the decode speed that the run's own figures predict.

A token takes the time in which it is computed with plus the time in which it waits. A change leaves the first as it is
and makes the second longer or shorter in proportion to the bytes that are missed: where the disk is what is waited for,
its time is bytes / rate, whatever the rate.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moe_offload.offload.planning.sizes import format_size
from moe_offload.offload.profiling.fewer_bits import next_format
from moe_offload.offload.profiling.run_facts import RunFacts
from moe_offload.offload.profiling.sections import (
    Curves,
    ExpertStatistics,
    Header,
    Lever,
    LeverKind,
    Levers,
    PolicyCurve,
    Prediction,
    Timing,
)

MODEL = "time of a token = time without waiting + waiting x (bytes missed after the change / bytes missed in the run)"
_WORTH_IT = 0.02
_MORE_SLOTS = 1.25  # where the knee lies behind us
_FASTER = 2.0
_GIB = 1024**3


@dataclass(frozen=True)
class _Run:
    """What the predictions start from: seconds and bytes of one decode token."""

    facts: RunFacts
    work_s: float
    wait_s: float
    disk_bytes: float

    @property
    def tokens_per_s(self) -> float:
        return 1 / (self.work_s + self.wait_s)

    def lever(
        self,
        kind: LeverKind,
        change: str,
        *,
        wait_s: float,
        byte_factor: float,
        formula: str,
        hit_ratio: float | None = None,
        option: str | None = None,
        note: str = "",
    ) -> Lever:
        """The lever after which a token waits for ``wait_s``."""
        speed = 1 / (self.work_s + wait_s)
        gain = speed / self.tokens_per_s - 1
        how = f": {option}" if option else ""
        sentence = (
            f"{change[:1].upper()}{change[1:]} would bring about {speed:.3g} tok/s "
            f"instead of {self.tokens_per_s:.3g} ({gain:+.0%}){note}{how}"
        )
        return Lever(kind, change, speed, gain, hit_ratio, self.disk_bytes * byte_factor, option, sentence, formula)


def levers(
    facts: RunFacts,
    header: Header,
    timing: Timing | None,
    curves: Curves | None,
    prediction: Prediction | None,
    experts: ExpertStatistics,
    expert_bits: float | None,
) -> Levers | None:
    """Every change that can be judged, best first; None where no time was measured."""
    split = timing.decode if timing else None
    if split is None or not split.tokens:
        return None
    run = _Run(
        facts, (split.clock_s - split.wait_s) / split.tokens, split.wait_s / split.tokens,
        header.disk_bytes_per_token or 0.0,
    )  # fmt: skip
    found = [
        *_slots_and_policy(run, curves, expert_bits),
        *_prefetch(run, split.tokens, prediction, experts),
        *_faster_disk(run, header),
    ]
    found.sort(key=lambda lever: -lever.gain)
    # What changes the answers is for the user to want; it is named only where nothing else helps.
    worth = [lever for lever in found if lever.gain >= _WORTH_IT]
    best = next((lever for lever in worth if lever.kind != "fewer_bits"), worth[0] if worth else None)
    if best is None:
        share = run.wait_s / (run.work_s + run.wait_s)
        following = f"No change to the cache is worth it: waiting for experts takes {share:.0%} of the time"
    else:
        following = best.sentence
    return Levers(MODEL, run.tokens_per_s, tuple(found), following)


def _faster_disk(run: _Run, header: Header) -> Iterator[Lever]:
    """On a GPU, only the part of what is awaited that comes from the disk comes faster; the rest is in RAM."""
    if not run.disk_bytes:
        return
    copied = header.pcie_bytes_per_token
    share = min(1.0, run.disk_bytes / copied) if copied else 1.0
    yield run.lever(
        "faster_disk",
        "a disk twice as fast",
        wait_s=run.wait_s * (1 - share + share / _FASTER),
        byte_factor=1.0,
        formula="waiting / 2" if share == 1 else f"half of the {share:.0%} of waiting that is for the disk",
    )


def _slots_and_policy(run: _Run, curves: Curves | None, expert_bits: float | None) -> Iterator[Lever]:
    if curves is None or curves.today is None or curves.today.hit_ratio >= 1:
        return
    today = curves.today
    own = next(curve for curve in curves.curves if curve.policy == run.facts.policy)

    def factor(ratio: float) -> float:
        return (1 - ratio) / (1 - today.hit_ratio)

    slots = _more_slots(own, curves)
    if slots is not None:
        ratio = _at(own, slots)
        change, option = _budget(run.facts, today.slots, slots)
        yield run.lever(
            "more_slots", change, wait_s=run.wait_s * factor(ratio), byte_factor=factor(ratio), hit_ratio=ratio,
            option=option, formula=f"misses of the {own.label} curve at {slots} and {today.slots} slots",
        )  # fmt: skip
    best = max((curve for curve in curves.curves if not curve.is_bound), key=lambda curve: _at(curve, today.slots))
    ratio = _at(best, today.slots)
    if best is not own and ratio > today.hit_ratio:
        yield run.lever(
            "policy", f"the policy {best.policy} instead of {own.policy}", wait_s=run.wait_s * factor(ratio),
            byte_factor=factor(ratio), hit_ratio=ratio, option=f"--policy {best.policy}",
            formula=f"misses of the {best.label} and {own.label} curves at {today.slots} slots",
        )  # fmt: skip
    smaller = next_format(run.facts.format, expert_bits)
    if smaller is not None:
        slots = min(own.slots[-1], int(today.slots / smaller.size_factor))
        ratio = max(_at(own, slots), today.hit_ratio)
        fewer = factor(ratio) * smaller.size_factor
        yield run.lever(
            "fewer_bits", f"experts in {smaller.spec} instead of {run.facts.format}", wait_s=run.wait_s * fewer,
            byte_factor=fewer, hit_ratio=ratio, option=f"--format {smaller.spec}",
            note=", at some loss of quality", formula=f"bytes x {smaller.size_factor:.2f}, and the {own.label} curve "
            f"at the {slots} slots that fit into the same memory",
        )  # fmt: skip


def _more_slots(own: PolicyCurve, curves: Curves) -> int | None:
    """To the knee if it is ahead, else a quarter more; None where all experts have slots."""
    assert curves.today is not None
    today, most = curves.today.slots, own.slots[-1]
    if today >= most:
        return None
    quarter = min(most, round(today * _MORE_SLOTS))
    return max(quarter, curves.knee.slots) if curves.knee else quarter


def _budget(facts: RunFacts, slots_now: int, slots: int) -> tuple[str, str | None]:
    """The change in words, and the option that makes it."""
    layers = len(facts.num_experts)
    change = f"{slots / layers:.3g} slots a layer instead of {slots_now / layers:.3g}"
    if facts.expert_bytes is None:
        return change, None
    more_bytes = (slots - slots_now) * sum(facts.expert_bytes) / layers
    change += f" ({format_size(round(more_bytes))} more)"
    name, budget = ("vram", facts.vram_bytes) if facts.vram_bytes is not None else ("ram", facts.ram_bytes)
    if budget is None:
        return change, None
    machine = facts.machine
    if name == "ram" and machine and machine.memory_bytes and budget + more_bytes > machine.memory_bytes:
        return f"{change}, beyond this machine's {format_size(machine.memory_bytes)}", None
    gib = (budget + more_bytes) / _GIB
    digits = 1 if gib >= 1 else 3
    return change, f"--{name} {np.ceil(gib * 10**digits) / 10**digits:.{digits}f}GiB"


def _prefetch(run: _Run, tokens: int, prediction: Prediction | None, experts: ExpertStatistics) -> Iterator[Lever]:
    if run.facts.is_prefetch_off:
        recalls = [r for r in (experts.coactivation.recall if experts.coactivation else ()) if r is not None]
        if recalls:
            recall = sum(recalls) / len(recalls)
            # What is read ahead is read while others are computed with: never faster than the disk reads it all.
            wait_s = max((1 - recall) * run.wait_s, run.wait_s - run.work_s)
            yield run.lever(
                "prefetch", "prefetching", wait_s=wait_s, byte_factor=1.0, option="--prefetch auto",
                formula=f"waiting x (1 - {recall:.2f}), what a table of frequencies foresees of the next layer; "
                "routers asked ahead foresee more",
            )  # fmt: skip
    elif prediction is not None and prediction.hidden_s is not None and prediction.wasted_bytes is not None:
        parts = (prediction.used_bytes, prediction.late_bytes, prediction.demand_bytes)
        needed = sum(part or 0 for part in parts)
        share = needed / (needed + prediction.wasted_bytes) if needed else 1.0
        yield run.lever(
            "prefetch", "no prefetching", wait_s=run.wait_s * share + prediction.hidden_s / tokens, byte_factor=share,
            option="--prefetch off",
            formula="waiting less the share of what is read in vain, plus the time that reading ahead has hidden",
        )  # fmt: skip


def _at(curve: PolicyCurve, slots: int) -> float:
    return float(np.interp(slots, curve.slots, curve.hit_ratio))
