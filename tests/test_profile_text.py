"""A report on a terminal: it fits into 80 columns, and its figures are the report's."""

import pytest
from profile_samples import (
    bare_sample_report,
    gpu_sample_report,
    large_sample_report,
    sample_report,
    slow_sample_report,
)

from moe_offload.offload.profiling import figures
from moe_offload.offload.profiling.blocks import bar, condensed, heat, sparkline


@pytest.mark.parametrize(
    "make", [sample_report, slow_sample_report, bare_sample_report, large_sample_report, gpu_sample_report]
)
def test_it_fits_into_eighty_columns(make):
    lines = str(make()).splitlines()
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if line != line.rstrip()]


def test_its_figures_are_the_reports():
    report = sample_report()
    text, head = str(report), report.header
    words = " ".join(text.split())
    assert f"speed {figures.speed(head.tokens_per_s)} (median step {figures.seconds(head.median_step_s)})" in words
    assert f"{head.hit_ratio_decode:.0%} in decode, {head.hit_ratio_prefill:.0%} in prefill" in words
    assert f"stalled {head.stall_share:.1%}" in words
    assert f"{figures.size(head.disk_bytes_per_token)} from disk" in words
    assert f"{figures.speed(head.bound.tokens_per_s)} by memory" in words
    assert report.levers.next in words
    assert "sum 100.0% of the wall clock" in words
    for lever in report.levers.levers:
        assert f"{lever.gain:+.0%} {figures.speed(lever.tokens_per_s)}" in words
    for layer in report.layers:
        assert f"\n{layer.layer:>7}  " in text
    assert sum("starving" in line for line in text.splitlines()) == sum(layer.starving for layer in report.layers)
    assert f"{report.curves.curves[0].hit_ratio[-1]:.1%}" in text
    assert "recall 79%, precision 79%" in text


def test_what_is_missing_is_named_and_nothing_is_zero():
    text = str(bare_sample_report())
    assert "timing: the trace has no times" in text
    assert "speed" not in text
    assert "hits   " not in text.split("Hits in decode by cache size")[0]


def test_many_layers_are_shortened_to_those_that_miss_most():
    report = large_sample_report()
    text = str(report)
    assert "and 62 more, which the page and the JSON have" in text
    worst = min(report.layers, key=lambda layer: layer.hit_ratio)
    assert f"\n{worst.layer:>7}  " in text


def test_bars_lines_and_shades():
    assert [bar(share, 4) for share in (0, 0.5, 1, 7, -1, 0.03)] == ["", "██", "████", "████", "", "▏"]
    assert sparkline([0, 1, 2, 7], 10) == "▁▂▃█"
    assert sparkline([], 10) == heat([], 10) == ""
    assert sparkline([0, 0], 10) == "▁▁"
    assert heat([0, 1, 50, 100], 4) == " ░▓█"
    assert condensed([1, 3, 5, 7], 2) == [2, 6]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (figures.speed(None), "-"),
        (figures.speed(283.9), "284 tok/s"),
        (figures.speed(9.999), "10.0 tok/s"),
        (figures.speed(0.123), "0.12 tok/s"),
        (figures.seconds(0.00012), "120 us"),
        (figures.seconds(0.0999), "100 ms"),
        (figures.seconds(0.0), "0.0 us"),
        (figures.seconds(12.34), "12.3 s"),
        (figures.seconds(1234.0), "1234 s"),
        (figures.percent(0.125, 1), "12.5%"),
        (figures.rate(2.41e9), "2.41 GB/s"),
        (figures.size(None), "-"),
    ],
)
def test_figures_for_people(text, expected):
    assert text == expected
