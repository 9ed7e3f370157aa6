"""Where the time goes: totals of both phases, and the run step by step."""

from collections.abc import Iterator

from markupsafe import Markup

from moe_offload.offload.profiling.charts.frame import frame
from moe_offload.offload.profiling.charts.markup import element
from moe_offload.offload.profiling.charts.share_bar import share_bar
from moe_offload.offload.profiling.charts.table import table
from moe_offload.offload.profiling.page.decode_strip import DecodeStrip
from moe_offload.offload.profiling.page.figure import Figure, Section
from moe_offload.offload.profiling.page.link_figures import link_totals
from moe_offload.offload.profiling.page.numbers import duration, percent, time_axis, whole_percent
from moe_offload.offload.profiling.report import ProfileReport
from moe_offload.offload.profiling.sections import TimeSplit, Timing

PARTS = ("dense", "router", "experts", "wait", "other")
NAMES = {
    "dense": "dense layers",
    "router": "routers",
    "experts": "computing experts",
    "wait": "waiting for experts",
    "other": "other",
}
LEGEND = tuple((f"fill-{part}", NAMES[part]) for part in PARTS)


def time_section(report: ProfileReport, missing: tuple[str, ...]) -> Section:
    """Both figures, as far as steps were timed."""
    timing = report.timing
    figures = [*_totals(timing), *_strip(report), *link_totals(report.link)] if timing else []
    return Section("time", "Where the time goes", _finding(timing), tuple(figures), missing)


def _finding(timing: Timing | None) -> str:
    if timing is None or timing.decode is None or timing.decode.tokens == 0:
        return ""
    split = timing.decode
    spent = sorted(PARTS, key=lambda part: -part_s(split, part))
    first, second = ((NAMES[part], part_s(split, part) / max(split.clock_s, 1e-12)) for part in spent[:2])
    return (
        f"A decode step takes {duration(split.clock_s / max(split.steps, 1))}: {whole_percent(first[1])} of it "
        f"{first[0]}, {whole_percent(second[1])} {second[0]}."
    )


def part_s(split: TimeSplit, part: str) -> float:
    """The seconds of one part of the split."""
    seconds: float = getattr(split, f"{part}_s")
    return seconds


def _totals(timing: Timing) -> Iterator[Figure]:
    splits = [
        (name, split)
        for name, split in (("decode", timing.decode), ("prefill", timing.prefill))
        if split and split.steps
    ]
    if not splits:
        return
    bars = [
        element("div", element("div", f"{name}, {duration(split.clock_s)}", class_="bar-name"), _bar(name, split))
        for name, split in splits
    ]
    head = ["", *(f"a {name} step" for name, _ in splits)]
    rows = [[NAMES[part], *(_cell(split, part) for _, split in splits)] for part in PARTS]
    rows.append(["the clock", *(duration(split.clock_s / split.steps) for _, split in splits)])
    rows.append(["accounted for", *(percent(split.accounted_share) for _, split in splits)])
    yield Figure(
        "Total time by what it was spent on",
        Markup("").join([*bars, table(head, rows)]),
        "Waiting is time in which nothing was computed because an expert had not arrived: more slots, fewer bits, a "
        "better policy or a faster disk shorten it. Dense layers and experts are bound by memory: fewer bits "
        "shorten them. Other is the head, sampling and Python. The parts are measured apart from the clock; the "
        "last row says how much of it they explain.",
        LEGEND,
    )


def _cell(split: TimeSplit, part: str) -> str:
    seconds = part_s(split, part)
    return f"{duration(seconds / split.steps)}, {percent(seconds / split.clock_s if split.clock_s else None)}"


def _bar(name: str, split: TimeSplit) -> Markup:
    parts = [(part, part_s(split, part), f"{NAMES[part]}: {_cell(split, part)} a step") for part in PARTS]
    return share_bar(f"time-{name}", parts, summary=f"{name}: " + "; ".join(tip for _, _, tip in parts))


def _strip(report: ProfileReport) -> Iterator[Figure]:
    strip = DecodeStrip.of(report.steps)
    series = [strip.per_step(getattr(report.steps, f"{part}_s")) for part in PARTS]
    if not strip.points or any(values is None for values in series):
        return
    per_step = list(zip(*(values or () for values in series), strict=True))
    # Where single steps are far longer than all others they stand out of the picture, so that it shows the others.
    totals = sorted(sum(parts) for parts in per_step)
    usual = totals[int(0.98 * (len(totals) - 1))]
    y = time_axis("time per step", totals[-1] if totals[-1] < 1.5 * usual else usual)
    tips = (
        f"{duration(sum(parts))}: "
        + ", ".join(f"{NAMES[part]} {duration(part_s)}" for part, part_s in zip(PARTS, parts, strict=True))
        for parts in per_step
    )
    drawing = strip.columns([tuple(zip(PARTS, parts, strict=True)) for parts in per_step], tips, y)
    yield Figure(
        "Each decode step",
        frame(
            "time-steps",
            drawing,
            x=strip.axis,
            y=y,
            summary=f"Time of {strip.num_steps} decode steps by what it was spent on",
        ),
        "One column a step, in the order of the run. An even floor is computing; peaks are waiting. Peaks at the "
        "start mean a cold cache, peaks that go on mean too few slots.",
        LEGEND,
        strip.note(cut=totals[-1] > y.high),
    )
