"""What the page says first: the figures of the run, and what to change next."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from markupsafe import Markup, escape

from moe_offload.offload.profiling.charts.markup import element
from moe_offload.offload.profiling.page.numbers import (
    count,
    duration,
    percent,
    signed_percent,
    size,
    three_digits,
    whole_percent,
)
from moe_offload.offload.profiling.report import ProfileReport
from moe_offload.offload.profiling.sections import Lever

TITLES = {
    "tokens_per_s": "Decoding",
    "time_to_first_token_s": "Time to first token",
    "hit_ratio_decode": "Hit ratio in decode",
    "hit_ratio_prefill": "Hit ratio in prefill",
    "disk_bytes_per_token": "Read from disk",
    "pcie_bytes_per_token": "Over PCIe",
    "link": "Link to the GPU",
    "stall_share": "Waiting for experts",
    "bound": "Distance from the bound",
    "levers": "Next best lever",
}
RESOURCE = {"disk": "the disk", "memory": "memory", "pcie": "the link to the GPU"}


@dataclass(frozen=True)
class Card:
    """One figure: its name, its value, a line on what it is measured against, and the number behind it."""

    name: str
    title: str
    value: str
    beside: str
    number: float | None


@dataclass(frozen=True)
class Headline:
    """The speed, its bound as a gauge, the other figures, and the levers."""

    facts: tuple[str, ...]
    speed: Card
    gauge: Markup
    cards: tuple[Card, ...]
    exact: bool | None
    exactness: str
    next_lever: Markup
    levers: tuple["LeverRow", ...]
    levers_model: str


@dataclass(frozen=True)
class LeverRow:
    """One lever, with a bar as long as its gain is large beside the largest."""

    lever: Lever
    sentence: Markup
    gain: str
    tokens_per_s: str
    bar: Markup


def headline(report: ProfileReport) -> Headline:
    """The header of the page."""
    header, levers = report.header, report.levers
    speed = Card(
        "tokens_per_s", TITLES["tokens_per_s"], three_digits(header.tokens_per_s), "tok/s", header.tokens_per_s
    )
    return Headline(
        tuple(_facts(report)),
        speed,
        _gauge(report),
        tuple(_cards(report)),
        header.exactness.lossless,
        header.exactness.text,
        with_options(levers.next if levers else ""),
        tuple(_lever_rows(levers.levers if levers else ())),
        levers.model if levers else "",
    )


def _facts(report: ProfileReport) -> Iterator[str]:
    run = report.run
    if run.num_experts:
        most = max(run.num_experts)
        yield f"{len(run.num_experts)} layers of {most} experts, {run.top_k} a token"
    if run.format:
        yield run.format
    if run.num_slots and any(run.num_experts):
        yield f"{whole_percent(sum(run.num_slots) / sum(run.num_experts))} of the experts in memory"
    if run.policy:
        yield f"policy {run.policy}"
    if run.prefetch:
        yield f"prefetch {run.prefetch}"
    read = f" after {count(run.prefill_tokens)} read" if run.prefill_tokens else ""
    yield f"{count(run.decode_tokens)} tokens decoded{read}"
    if run.recorded_at:
        yield run.recorded_at[:10]


def _cards(report: ProfileReport) -> Iterator[Card]:
    header = report.header
    step = "" if header.median_step_s is None else f"median step {duration(header.median_step_s)}"
    prefill = "" if header.hit_ratio_prefill is None else f"prefill {percent(header.hit_ratio_prefill)}"
    for name, write, beside in (
        ("time_to_first_token_s", duration, step),
        ("hit_ratio_decode", percent, prefill),
        ("disk_bytes_per_token", size, "a token"),
        ("pcie_bytes_per_token", size, "a token"),
        ("stall_share", percent, "of decoding"),
    ):
        number: float | None = getattr(header, name)
        if number is not None:
            yield Card(name, TITLES[name], write(number), beside, number)


def _gauge(report: ProfileReport) -> Markup:
    bound = report.header.bound
    if bound is None:
        return element(
            "p", "How far this is from what the machine allows is not known: no rates were measured.", class_="quiet"
        )
    return Markup("").join(
        [
            element(
                "div",
                element("i", style=f"width:{100 * min(1.0, bound.share):.1f}%"),
                class_="gauge",
                role="img",
                aria_label=f"{whole_percent(bound.share)} of the bound",
                data_chart="bound",
                data_value=bound.share,
            ),
            element(
                "p",
                element("b", whole_percent(bound.share)),
                f" of the {three_digits(bound.tokens_per_s)} tok/s that {RESOURCE[bound.by]} allows",
                class_="quiet",
            ),
        ]
    )


def _lever_rows(levers: tuple[Lever, ...]) -> list[LeverRow]:
    largest = max((lever.gain for lever in levers), default=0.0)
    return [
        LeverRow(
            lever,
            with_options(lever.sentence),
            signed_percent(lever.gain),
            three_digits(lever.tokens_per_s),
            element("i", style=f"width:{100 * max(0.0, lever.gain) / largest if largest > 0 else 0:.1f}%"),
        )
        for lever in levers
    ]


def with_options(sentence: str) -> Markup:
    """The sentence, with options of the command line set as what they are: "--ram 8GiB"."""
    return Markup(re.sub(r"(--[a-z][a-z-]*(?: [\w.:]*\w)?)", r"<code>\1</code>", str(escape(sentence))))
