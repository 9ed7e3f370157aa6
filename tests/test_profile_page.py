"""The page of a profile shows the numbers of its report: in attributes, in positions, in words."""

import functools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from html_tree import Element, parse
from profile_samples import bare_sample_report, large_sample_report, sample_report

from moe_offload.cache.registry import policy_names
from moe_offload.offload.profiling.charts.heat_map import LEVELS, level_of
from moe_offload.offload.profiling.page import render
from moe_offload.offload.profiling.report import ProfileReport
from moe_offload.offload.profiling.sections import Missing, StepSeries, Usage

SIDE = 1000.0
# Coordinates are written with two decimals.
NEAR = pytest.approx


@pytest.fixture(scope="module")
def report() -> ProfileReport:
    return sample_report()


@pytest.fixture(scope="module")
def page() -> Element:
    return drawn(sample_report)


@functools.cache
def drawn(make: Callable[[], ProfileReport]) -> Element:
    return parse(render(make()))


def numbers(text: str) -> list[float | None]:
    return [json.loads(each) for each in text.split()]


def chart(page: Element, name: str) -> Element:
    return page.one(chart=name)


def values(page: Element, name: str) -> list[list[float | None]]:
    """The numbers of every column of a chart."""
    return [numbers(each["data-values"]) for each in chart(page, name).all("g", "column")]


def axes(of: Element) -> tuple[float, float, float, float]:
    return tuple(float(of[f"data-{side}"]) for side in ("x-low", "x-high", "y-low", "y-high"))


def decode_sums(report: ProfileReport, series: str) -> list[float]:
    steps = report.steps
    return [
        value / many
        for value, many, phase in zip(getattr(steps, series), steps.num_steps, steps.phase, strict=True)
        if phase == "decode"
    ]


@pytest.mark.parametrize("make", [sample_report, bare_sample_report, large_sample_report])
def test_holds_the_report_itself(make):
    report, page = make(), drawn(make)
    assert ProfileReport.from_json(embedded_json(page)) == report


def embedded_json(page: Element) -> str:
    (script,) = [each for each in page.all("script") if each.attributes.get("type") == "application/json"]
    return script.text


def test_headline_has_the_numbers_of_the_header(report: ProfileReport, page: Element):
    shown = {
        each["data-figure"]: json.loads(each["data-value"]) for each in page.walk() if "data-figure" in each.attributes
    }
    assert shown == {
        name: getattr(report.header, name)
        for name in ("tokens_per_s", "time_to_first_token_s", "hit_ratio_decode", "disk_bytes_per_token", "stall_share")
    }
    assert float(chart(page, "bound")["data-value"]) == report.header.bound.share
    assert page.one(class_="lever-sentence").full_text() == report.levers.next
    assert [float(each["data-gain"]) for each in page.one(class_="levers").all("li")] == [
        lever.gain for lever in report.levers.levers
    ]


def test_pcie_has_a_card_where_it_is_known(report: ProfileReport):
    page = parse(render(replace(report, header=replace(report.header, pcie_bytes_per_token=2.0**20))))
    assert page.one(figure="pcie_bytes_per_token").full_text() == "Over PCIe 1.0 MiB a token"


def test_times_are_those_of_the_report(report: ProfileReport, page: Element):
    parts = ("dense", "router", "experts", "wait", "other")
    for phase in ("decode", "prefill"):
        split = getattr(report.timing, phase)
        bar = chart(page, f"time-{phase}").all("rect")
        assert {each["data-kind"]: float(each["data-value"]) for each in bar} == {
            part: getattr(split, f"{part}_s") for part in parts
        }
        total = sum(float(each["data-value"]) for each in bar)
        assert [float(each["width"]) for each in bar] == NEAR(
            [SIDE * float(each["data-value"]) / total for each in bar], abs=0.01
        )
    series = [decode_sums(report, f"{part}_s") for part in parts]
    assert values(page, "time-steps") == [list(each) for each in zip(*series, strict=True)]


def test_strips_are_those_of_the_report(report: ProfileReport, page: Element):
    assert values(page, "token-wait") == [[wait_s] for wait_s in decode_sums(report, "wait_s")]
    misses, late, hits = (decode_sums(report, name) for name in ("misses", "late", "hits"))
    assert values(page, "token-outcomes") == [
        [miss, late_each, hit - late_each] for miss, late_each, hit in zip(misses, late, hits, strict=True)
    ]


def test_layers_are_those_of_the_report(report: ProfileReport, page: Element):
    assert values(page, "layer-hits") == [[layer.hit_ratio] for layer in report.layers]
    drawn = chart(page, "layer-hits").all("g", "column")
    starving = [index for index, each in enumerate(drawn) if "starving" in each.classes]
    assert starving == [index for index, layer in enumerate(report.layers) if layer.starving]
    assert values(page, "layer-times") == [
        [getattr(layer, f"{part}_s") / report.run.decode_steps for part in ("dense", "router", "experts", "wait")]
        for layer in report.layers
    ]
    assert values(page, "entropy") == [
        [load.entropy_bits, load.max_entropy_bits - load.entropy_bits] for load in report.experts.load
    ]


@pytest.mark.parametrize("make", [sample_report, large_sample_report])
@pytest.mark.parametrize("name", ["time-steps", "token-wait", "token-outcomes", "layer-hits", "layer-times", "entropy"])
def test_columns_are_as_high_as_their_numbers(make, name: str):
    of = chart(drawn(make), name)
    x_low, x_high, y_low, y_high = axes(of)
    heights = set()
    for column in of.all("g", "column"):
        reach, *rects = column.all("rect")
        assert float(reach["x"]) == NEAR(SIDE * (float(column["data-x"]) - x_low) / (x_high - x_low), abs=0.02)
        bottom = 0.0
        for rect in rects:
            kind = rect["class"].removeprefix("fill-")
            value = dict(zip(column["data-kinds"].split(), numbers(column["data-values"]), strict=True))[kind]
            top = min(y_high, bottom + value)
            assert float(rect["height"]) == NEAR(SIDE * (top - bottom) / (y_high - y_low), abs=0.02)
            assert float(rect["y"]) + float(rect["height"]) == NEAR(
                SIDE * (y_high - bottom) / (y_high - y_low), abs=0.02
            )
            heights.add(rect["height"])
            bottom = top
    assert len(heights) > 3


def cells(of: Element) -> dict[tuple[int, int], str]:
    """What is painted: the class of every cell, by column and row from below."""
    _, columns, _, rows = axes(of)
    painted = {}
    for group in of.all("g", "cells"):
        for path in group.all("path"):
            for x, y, width, height in re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)H[\d.]+z", path["d"]):
                assert float(width) == NEAR(SIDE / columns, abs=0.02)
                first = round((SIDE - float(y) - float(height)) * rows / SIDE)
                for row in range(first, first + round(float(height) * rows / SIDE)):
                    key = (round(float(x) * columns / SIDE), row)
                    assert key not in painted
                    painted[key] = path["class"]
    return painted


def painted_as(fields, highest: float) -> dict[tuple[int, int], str]:
    return {
        (column, row): "unknown" if value is None else f"level-{level_of(value, highest)}"
        for column, field in enumerate(fields)
        for row, value in enumerate(field)
    }


def test_heat_maps_are_those_of_the_report(report: ProfileReport, page: Element):
    usage = report.usage
    frames = usage.residency.frames
    fields = {
        "uses": [list(map(float, layer)) for layer in usage.decode_uses],
        "hits": [
            [hit / asked if asked else None for hit, asked in zip(*pair, strict=True)]
            for pair in zip(usage.hits, usage.requests, strict=True)
        ],
        "residency": [
            [
                sum(int(frame[layer][expert]) for frame in frames) / 9 / len(frames)
                for expert in range(len(frames[0][layer]))
            ]
            for layer in range(len(frames[0]))
        ],
    }
    for name, expected in fields.items():
        of = chart(page, f"heat-{name}")
        shown = [numbers(each["data-values"]) for each in of.all("g", "cells")]
        for shown_layer, layer in zip(shown, expected, strict=True):
            assert shown_layer == NEAR(layer) if None not in layer else shown_layer == layer
    assert cells(chart(page, "heat-hits")) == painted_as(fields["hits"], 1.0)
    assert cells(chart(page, "heat-residency")) == painted_as(fields["residency"], 1.0)
    ordered = sorted(value for layer in fields["uses"] for value in layer)
    assert cells(chart(page, "heat-uses")) == painted_as(fields["uses"], ordered[int(0.99 * (len(ordered) - 1))])


def test_coactivation_maps_are_those_of_the_report(report: ProfileReport, page: Element):
    maps = report.experts.coactivation.maps
    highest = max(max(map(max, each.probability)) for each in maps)
    for each in maps:
        of = chart(page, f"coactivation-{each.layer}")
        shown = [numbers(group["data-values"]) for group in of.all("g", "cells")]
        assert shown == [list(row) for row in each.probability]
        assert cells(of) == painted_as(each.probability, highest)


@pytest.mark.parametrize(("value", "level"), [(0.0, 0), (0.0999, 0), (0.1, 1), (0.999, 9), (1.0, 9), (5.0, 9)])
def test_levels_divide_the_range_evenly(value: float, level: int):
    assert LEVELS == 10
    assert level_of(value, 1.0) == level
    assert level_of(value, 0.0) == 0


def expected_lines(report: ProfileReport) -> dict[str, dict[str, list[tuple[float, float | None]]]]:
    prediction, repetition, coactivation = report.prediction, report.experts.repetition, report.experts.coactivation

    def by_layer(ratios):
        return [(layer + 0.5, ratio) for layer, ratio in enumerate(ratios)]

    return {
        "curves": {
            "policy-bound" if curve.is_bound else f"policy-{curve.policy}": list(
                zip(curve.resident_share, curve.hit_ratio, strict=True)
            )
            for curve in report.curves.curves
        },
        "prediction": {
            f"{name}-{index + 1}": by_layer([row[index] for row in getattr(prediction, f"layer_{name}")])
            for name in ("recall", "precision")
            for index in range(len(prediction.distances))
        },
        "repetition": {
            **{name: by_layer(getattr(repetition, name)) for name in ("first", "any", "share")},
            **{f"{name}-random": by_layer(getattr(repetition, f"random_{name}")) for name in ("first", "any", "share")},
        },
        "coactivation": {
            "table-recall": by_layer(coactivation.recall),
            "base-recall": by_layer(coactivation.base_recall),
        },
    }


@pytest.mark.parametrize("name", ["curves", "prediction", "repetition", "coactivation"])
def test_lines_are_those_of_the_report(report: ProfileReport, page: Element, name: str):
    of = chart(page, name)
    x_low, x_high, y_low, y_high = axes(of)
    shown = {}
    for group in of.all("g", "series"):
        points = list(zip(numbers(group["data-x"]), numbers(group["data-y"]), strict=True))
        shown[group["data-series"]] = points
        drawn = re.findall(r"[ML]([\d.]+) ([\d.]+)", group.one("path", "line")["d"])
        assert [float(number) for point in drawn for number in point] == NEAR(
            [
                number
                for x, y in points
                if y is not None
                for number in (SIDE * (x - x_low) / (x_high - x_low), SIDE * (y_high - y) / (y_high - y_low))
            ],
            abs=0.02,
        )
    assert shown == expected_lines(report)[name]


def test_todays_budget_and_the_knee_are_marked(report: ProfileReport, page: Element):
    marks = {each["data-mark"]: each for each in chart(page, "curves").all("g", "pointed-out")}
    for name in ("today", "knee"):
        point = getattr(report.curves, name)
        assert float(marks[name]["data-x"]) == point.resident_share
        assert float(marks[name]["data-y"]) == point.hit_ratio
        assert float(marks[name].one("line")["x1"]) == NEAR(SIDE * point.resident_share, abs=0.01)


def test_bytes_are_those_of_the_report(report: ProfileReport, page: Element):
    bar = {each["data-kind"]: int(each["data-value"]) for each in chart(page, "prediction-bytes").all("rect")}
    assert bar == {name: getattr(report.prediction, f"{name}_bytes") for name in ("used", "late", "demand", "wasted")}


def test_every_chart_is_named_for_those_who_do_not_see_it(page: Element):
    drawings = page.all("svg")
    assert len(drawings) > 15
    for drawing in drawings:
        assert drawing["role"] == "img"
        assert drawing["aria-label"] == drawing.children[0].text
        assert drawing["viewbox"] == "0 0 1000 1000"


def test_fetches_nothing(report: ProfileReport):
    text = render(report)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<img|<iframe", text)
    for name, target in re.findall(r'\b(src|href)="([^"]*)"', text):
        assert (name, target[:1]) == ("href", "#") or target == "data:,"


def test_names_from_elsewhere_stay_text(report: ProfileReport):
    hostile = '</script><script>alert(1)</script><img src=x onerror="alert(2)">{{ 7 * 7 }}'
    run = replace(report.run, model=hostile, sequences=(replace(report.run.sequences[0], name=hostile),))
    hurt = replace(
        report,
        run=run,
        header=replace(report.header, exactness=replace(report.header.exactness, text=hostile)),
        levers=replace(report.levers, next=hostile),
        curves=replace(report.curves, curves=(replace(report.curves.curves[0], label=hostile),)),
        missing=(Missing("timing", hostile), Missing(hostile, "")),
    )
    page = parse(render(hurt))
    assert len(page.all("script")) == 2
    assert not page.all("img")
    assert ProfileReport.from_json(embedded_json(page)) == hurt
    assert page.one("h1").text == hostile


def test_says_what_is_missing():
    report = bare_sample_report()
    page = parse(render(report))
    sections = {each["id"]: each for each in page.all("section")}
    reasons = {each.section: each.reason for each in report.missing}
    for name, section in (("timing", "time"), ("prediction", "prediction")):
        assert sections[section].one(class_="missing").text == reasons[name]
    for section in sections.values():
        assert section.all("figure") or section.all(class_="missing")
    assert not [each for each in page.walk() if "data-figure" in each.attributes]
    words = page.full_text()
    assert all(reason in words for reason in reasons.values())


def test_says_once_why_figures_of_the_header_are_missing():
    both = (Missing("stall_share", "no times"), Missing("tokens_per_s", "no times"), Missing("bound", "no rates"))
    page = parse(render(replace(sample_report(), missing=both)))
    assert [each.text for each in page.one("details", "not-told").all("li")] == [
        "Waiting for experts, Decoding: no times",
        "Distance from the bound: no rates",
    ]


def test_options_of_the_command_line_stand_out(report: ProfileReport):
    levers = replace(report.levers, next="Two more slots & a disk: --ram 2.5GiB --prefetch off.")
    sentence = parse(render(replace(report, levers=levers))).one("p", "lever-sentence")
    assert [each.text for each in sentence.all("code")] == ["--ram 2.5GiB", "--prefetch off"]
    assert sentence.full_text().startswith("Two more slots & a disk:")


@pytest.mark.parametrize("num_steps", [30, 400, 401, 5000])
def test_a_strip_has_no_more_columns_than_a_screen_can_show(report: ProfileReport, num_steps: int):
    wait_s = tuple(0.001 * (step % 7) for step in range(num_steps))
    same = dict.fromkeys(("requests", "num_tokens", "num_steps"), (1,) * num_steps)
    steps = StepSeries(
        steps_per_point=1,
        first_step=tuple(range(num_steps)),
        sequence=tuple(step // 1000 for step in range(num_steps)),
        phase=("decode",) * num_steps,
        **same,
        **dict.fromkeys(("hits", "late", "misses", "wall_s", "dense_s", "router_s", "experts_s", "other_s")),
        **dict.fromkeys(("copied_demand_bytes", "copied_ahead_bytes", "link_busy_s")),
        wait_s=wait_s,
    )
    of = chart(parse(render(replace(report, steps=steps))), "token-wait")
    drawn = of.all("g", "column")
    together = -(-num_steps // 400)
    assert len(drawn) == -(-num_steps // together) <= 400
    assert [float(each["data-x"]) for each in drawn] == list(range(0, num_steps, together))
    assert [numbers(each["data-values"])[0] for each in drawn] == NEAR(
        [sum(part) / len(part) for first in range(0, num_steps, together) if (part := wait_s[first : first + together])]
    )
    last = drawn[-1].all("rect")[0]
    assert float(last["x"]) + float(last["width"]) == NEAR(SIDE, abs=0.02)


def test_a_large_model_stays_small_and_says_what_was_summed_up():
    report = large_sample_report()
    layers, experts = 94, 512
    rows = tuple(tuple((layer * 31 + expert * 7) % 97 for expert in range(experts)) for layer in range(layers))
    large = replace(
        report,
        run=replace(report.run, num_experts=(experts,) * layers),
        usage=Usage(rows, rows, rows, rows, None),
    )
    text = render(large)
    assert len(text) < 3.5e6
    page = parse(text)
    uses = chart(page, "heat-uses")
    assert uses["data-per-row"] == "2"
    assert numbers(uses.all("g", "cells")[3]["data-values"]) == [
        (rows[3][expert] + rows[3][expert + 1]) / 2 for expert in range(0, experts, 2)
    ]
    notes = " ".join(each.full_text() for each in page.all(class_="note"))
    assert "mean of 2 neighbouring experts" in notes


def test_the_pictures_of_the_documents_are_there_and_small():
    docs = Path(__file__).parent.parent / "docs"
    named = re.findall(r"images/profile-[a-z-]+\.png", (docs / "profiling.md").read_text(encoding="utf-8"))
    assert len(named) > 10
    for name in named:
        assert 0 < (docs / name).stat().st_size < 80_000, name
    assert {path.name for path in (docs / "images").glob("profile-*.png")} == {Path(name).name for name in named}


@pytest.mark.parametrize("name", [*policy_names(), "learned"])
def test_every_policy_has_a_line_of_its_own(report: ProfileReport, name: str):
    curve = replace(report.curves.curves[0], policy=name, is_bound=False)
    page = parse(render(replace(report, curves=replace(report.curves, curves=(curve,)))))
    assert chart(page, "curves").one("g", "series")["data-series"] == f"policy-{name}"
    assert f".policy-{name}," in page.one("style").text
