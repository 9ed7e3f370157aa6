"""Two reports beside each other."""

import io
from dataclasses import replace

import numpy as np
import pytest
from profile_samples import bare_sample_report, large_sample_report, sample_report, slow_sample_report
from rich.console import Console
from synthetic_trace import synthetic_trace

from moe_offload.offload.profiling.analyse import analyse
from moe_offload.offload.profiling.comparison import CAVEAT, compare
from moe_offload.offload.profiling.comparison_text import terminal_comparison


def as_text(comparison):
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(terminal_comparison(comparison, "a.json", "b.json"))
    return console.file.getvalue()


def test_what_was_set_and_what_came_out():
    a, b = sample_report(), slow_sample_report()
    found = compare(a, b)
    assert [(setting.name, setting.a, setting.b) for setting in found.settings] == [("slots a layer", "5", "3")]
    changes = {change.name: change for change in found.figures}
    assert changes["decoding"].change == pytest.approx(b.header.tokens_per_s / a.header.tokens_per_s - 1)
    assert changes["hits in decode"].text_a == f"{a.header.hit_ratio_decode:.1%}"
    assert changes["wait, a step"].b == pytest.approx(b.timing.decode.wait_s / 60)
    differences = [abs(change.b - change.a) for change in found.layers]
    assert differences == sorted(differences, reverse=True)
    assert differences[0] == max(abs(x.hit_ratio - y.hit_ratio) for x, y in zip(a.layers, b.layers, strict=True))
    text = as_text(found)
    assert max(map(len, text.splitlines())) <= 80
    assert CAVEAT in " ".join(text.split())


def test_a_report_and_itself():
    found = compare(sample_report(), sample_report())
    assert found.settings == found.layers == ()
    assert {change.change for change in found.figures} == {0.0, None}
    assert not found.step.is_clear
    assert found.notes == ("Both decoded along the same experts.",)
    assert "Nothing was set differently." in as_text(found)


def with_step_times(step_us):
    """A report whose decode steps take so long."""
    trace = synthetic_trace(num_layers=1, prompt_tokens=(1,), new_tokens=len(step_us))
    times = np.concatenate([[10_000], step_us])
    return analyse(replace(trace, step_us=times, step_begin_us=np.cumsum(times) - times))


def test_a_difference_counts_if_it_is_more_than_steps_vary():
    draw = np.random.default_rng(0)
    noise = draw.normal(0, 300, (3, 200)).astype(int)
    a, b, c = (with_step_times(5000 + extra + noise[index]) for index, extra in enumerate((0, 0, 300)))
    assert not compare(a, b).step.is_clear
    assert compare(a, c).step.is_clear
    assert compare(a, c).step.share == pytest.approx(0.06, abs=0.01)
    errors = 2 * np.hypot(noise[0].std(), noise[2].std()) / np.sqrt(200) / 5000
    assert compare(a, c).step.two_errors == pytest.approx(errors, rel=0.2)
    assert "more than its steps vary" in str(compare(a, c).step)
    assert "perhaps chance" in str(compare(a, b).step)


def test_steps_that_resemble_their_neighbours_count_for_less():
    draw = np.random.default_rng(0)
    steps = draw.normal(5000, 300, 200).astype(int)
    alone, in_order = with_step_times(steps), with_step_times(np.sort(steps))
    assert compare(in_order, in_order).step.two_errors > 3 * compare(alone, alone).step.two_errors


def test_runs_that_are_hard_to_compare_are_said_to_be():
    other = compare(sample_report(), large_sample_report())
    assert any("numbers of layers or experts" in note for note in other.notes)
    assert any("same amounts of text" in note for note in other.notes)
    renamed = replace(sample_report(), run=replace(sample_report().run, model="another"))
    assert "two models" in compare(sample_report(), renamed).notes[0]


def test_reports_without_times():
    found = compare(bare_sample_report(), sample_report())
    assert found.step is None
    assert found.layers == ()
    assert "283" in as_text(found) or "284" in as_text(found)
