"""What a profile tells of the link to the GPU: against sums by hand, on the terminal, on the page, beside another."""

from dataclasses import replace

import numpy as np
import pytest
from html_tree import parse
from profile_samples import gpu_sample_report, gpu_sample_trace, sample_report, without

from moe_offload.offload.profiling.analyse import analyse
from moe_offload.offload.profiling.comparison import compare
from moe_offload.offload.profiling.page import render
from moe_offload.offload.profiling.run_facts import Rates

PEAK = 30e9


def test_each_copy_is_of_the_step_that_had_begun():
    trace, report = gpu_sample_trace(), gpu_sample_report()
    num_steps = len(trace.step_us)
    demand, ahead = [0] * num_steps, [0] * num_steps
    for begin, size, kind in zip(trace.copy_begin_us, trace.copy_bytes, trace.copy_kind, strict=True):
        step = max((i for i, at in enumerate(trace.step_begin_us) if at <= begin), default=None)
        if step is not None:
            (ahead if kind else demand)[step] += int(size)
    assert report.steps.copied_demand_bytes == tuple(demand)
    assert report.steps.copied_ahead_bytes == tuple(ahead)
    copies = (np.array(demand) + ahead) / trace.transfer_bytes[0]
    assert report.steps.link_busy_s == pytest.approx(copies * 100e-6)
    decode = [step for step, phase in enumerate(report.steps.phase) if phase == "decode"]
    wall_s = sum(report.steps.wall_s[step] for step in decode)
    link = report.link
    assert link.peak_bytes_per_s == PEAK
    assert link.decode.demand_bytes == sum(demand[step] for step in decode)
    assert link.decode.ahead_bytes == sum(ahead[step] for step in decode)
    carried = link.decode.demand_bytes + link.decode.ahead_bytes
    assert link.decode.use == pytest.approx(carried / (wall_s * PEAK))
    assert link.decode.busy_share == pytest.approx(link.decode.busy_s / (2 * wall_s))
    assert report.header.pcie_bytes_per_token == pytest.approx(carried / report.run.decode_tokens)
    use = [(demand[step] + ahead[step]) / (report.steps.wall_s[step] * PEAK) for step in decode]
    assert link.step_use_p50 == pytest.approx(np.median(use))
    assert sum(gpu.demand_bytes + gpu.ahead_bytes for gpu in link.gpus) == trace.copy_bytes.sum(dtype=np.int64)
    assert [gpu.peak_bytes_per_s for gpu in link.gpus] == pytest.approx([20e9, 10e9])


def test_a_rate_measured_beside_may_be_the_faster():
    link = analyse(gpu_sample_trace(), rates=Rates(None, None, 15e9, None)).link
    assert [gpu.peak_bytes_per_s for gpu in link.gpus] == pytest.approx([20e9, 15e9])


def test_an_unknown_peak_leaves_the_bytes():
    link = analyse(replace(gpu_sample_trace(), link_bytes_per_s=np.array([20e9, 0.0], np.float32))).link
    assert link.peak_bytes_per_s is link.decode.use is link.step_use_p50 is None
    assert link.decode.demand_bytes == gpu_sample_report().link.decode.demand_bytes


def test_without_copies_there_is_none_and_it_says_why():
    report = analyse(without(gpu_sample_trace(), "copy_", "link_"))
    assert report.link is report.steps.link_busy_s is None
    assert {item.section: item.reason for item in report.missing}["link"] == (
        "the trace does not tell of copies to a GPU"
    )
    assert {item.section: item.reason for item in sample_report().missing}["link"] == (
        "the experts are computed on the CPU"
    )
    assert "Link to the GPU" not in str(sample_report())


def test_the_terminal_shows_it():
    text, decode = " ".join(str(gpu_sample_report()).split()), gpu_sample_report().link.decode
    assert f"Link to the GPU decode {decode.use:.0%} used, {decode.busy_share:.0%} of the time busy" in text
    assert "GPU 0 at most 20 GB/s" in text
    assert "GPU 1 at most 10 GB/s" in text


def test_the_page_shows_it_step_by_step():
    report = gpu_sample_report()
    page = parse(render(report))
    columns = page.one(chart="token-link").all("g", "column")
    shown = [[float(value) for value in column["data-values"].split()] for column in columns]
    decode = [step for step, phase in enumerate(report.steps.phase) if phase == "decode"]
    expected = [[report.steps.copied_demand_bytes[s], report.steps.copied_ahead_bytes[s]] for s in decode]
    assert shown == expected
    assert "What the link to the GPU carried" in page.full_text()
    assert "What the link to the GPU carried" not in parse(render(sample_report())).full_text()


def test_two_runs_beside_each_other():
    half = replace(gpu_sample_trace(), copy_bytes=gpu_sample_trace().copy_bytes // 2)
    changes = {change.name: change for change in compare(gpu_sample_report(), analyse(half)).figures}
    assert changes["link used"].change == pytest.approx(-0.5, abs=1e-3)
    assert changes["link busy"].change == 0
