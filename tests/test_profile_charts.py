"""What charts are made of: axes, elements, numbers as people read them."""

import pytest
from html_tree import parse

from moe_offload.offload.profiling.charts.axis import index_axis, number_axis, round_step
from moe_offload.offload.profiling.charts.columns import Column, columns
from moe_offload.offload.profiling.charts.lines import Line, lines
from moe_offload.offload.profiling.charts.markup import element, position
from moe_offload.offload.profiling.charts.share_bar import share_bar
from moe_offload.offload.profiling.page.numbers import (
    UNKNOWN,
    count,
    duration,
    percent,
    signed_percent,
    size,
    three_digits,
    time_axis,
)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 100, [0, 25, 50, 75, 100]),
        (0, 0.217, [0, 0.1, 0.2]),
        (0, 61, [0, 20, 40, 60]),
        (0.4, 1.0, [0.4, 0.6, 0.8, 1.0]),
        (0, 3e-5, [0, 1e-5, 2e-5, 3e-5]),
        (0, 0, [0]),
    ],
)
def test_ticks_are_round_numbers_within_the_range(low: float, high: float, ticks: list[float]):
    axis = number_axis("", low, high, str)
    assert [value for value, _ in axis.ticks] == pytest.approx(ticks)
    assert (axis.low, axis.high) == (low, high if high > low else low + 1)


@pytest.mark.parametrize(
    ("at_least", "step"), [(0.9, 1), (1.0, 1), (1.01, 2), (2.2, 2.5), (4, 5), (51, 100), (0.03, 0.05)]
)
def test_steps_are_round(at_least: float, step: float):
    assert round_step(at_least) == pytest.approx(step)


def test_a_share_stays_on_the_axis():
    axis = number_axis("", 2, 4, str)
    assert [axis.share(value) for value in (1, 2, 3, 4, 9)] == [0, 0, 0.5, 1, 1]


def test_counted_things_are_named_in_their_middle():
    axis = index_axis("layer", 94, first=3)
    assert axis.ticks[:2] == ((0.5, "3"), (20.5, "23"))
    assert axis.high == 94
    assert index_axis("expert", 4, step=2).ticks[-1] == (3.5, "6")
    assert index_axis("layer", 0).high == 1


def test_elements_escape_and_keep_digits():
    text = element("p", "<&>", class_="a", data_value=0.1 + 0.2, title='"', absent=None, x=1 / 3)
    assert str(text) == '<p class="a" data-value="0.30000000000000004" title="&#34;" x="0.33">&lt;&amp;&gt;</p>'


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1000.0, "1000"), (0.5, "0.5"), (12.345, "12.35"), (99.999, "100")]
)
def test_coordinates_are_short(value: float, text: str):
    assert position(value) == text


def test_a_column_that_is_too_high_is_cut_at_the_top():
    x, y = index_axis("", 1), number_axis("", 0, 10, str)
    drawn = parse(columns([Column(0, (("a", 6.0), ("b", 20.0), ("c", 5.0)), "tip")], x, y))
    _, first, second = drawn.all("rect")
    assert (first["y"], first["height"]) == ("400", "600")
    assert (second["y"], second["height"]) == ("0", "400")
    assert drawn.one("g", "column")["data-values"] == "6.0 20.0 5.0"


def test_a_line_is_broken_where_nothing_is_known():
    x, y = number_axis("", 0, 4, str), number_axis("", 0, 1, str)
    points = ((0, None), (1, 0.5), (2, 1.0), (3, None), (4, 0.0))
    drawn = parse(lines([Line("kind", "name", points, ("",) * 5)], x, y))
    assert drawn.one("path", "line")["d"] == "M250 500L500 0M1000 1000"
    assert len(drawn.all("path", "dot")) == 3
    assert drawn.one("g", "series")["data-y"] == "null 0.5 1.0 null 0.0"


def test_a_bar_of_nothing_has_no_width():
    drawn = parse(share_bar("name", [("a", 0, "tip"), ("b", 0, "tip")], summary="nothing"))
    assert [each["width"] for each in drawn.all("rect")] == ["0", "0"]


@pytest.mark.parametrize(
    ("write", "number", "text"),
    [
        (duration, 1.2345, "1.23 s"),
        (duration, 95.2, "95.2 s"),
        (duration, 0.0123, "12.3 ms"),
        (duration, 0.00085, "850 µs"),
        (duration, 0.99999, "1.00 s"),
        (duration, 0.0, "0 s"),
        (percent, 0.8744, "87.4 %"),
        (size, 1.5 * 2**30, "1.5 GiB"),
        (count, 12345, "12,345"),
        (three_digits, 7.249, "7.25"),
        (three_digits, 22.85, "22.9"),
        (three_digits, 1204.4, "1,204"),
        (three_digits, 30.0, "30"),
    ],
)
def test_numbers_are_written_for_people(write, number: float, text: str):
    assert write(number) == text
    assert write(None) == UNKNOWN


def test_gains_have_a_sign():
    assert [signed_percent(gain) for gain in (0.25, -0.02, 0.0)] == ["+25 %", "-2 %", "+0 %"]


@pytest.mark.parametrize(("longest_s", "last"), [(2.0, "2 s"), (0.06, "60 ms"), (4e-5, "40 µs")])
def test_the_ticks_of_a_time_axis_share_a_unit(longest_s: float, last: str):
    assert time_axis("", longest_s).ticks[-1][1] == last
