"""Profiling a loaded model: its report is of what the model did, and adds up to the clock outside."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loaded_models import PROMPT, loaded, make_pack

from moe_offload.cache import policy_names, read_trace
from moe_offload.errors import ConfigError
from moe_offload.offload.profiling.prompts import BUILT_IN, Prompt, parse_prompts
from moe_offload.offload.profiling.report import ProfileReport
from moe_offload.offload.profiling.run_facts import Rates

NUM_LAYERS, NUM_EXPERTS, NEW_TOKENS = 3, 8, 24
RATES = Rates(10e9, 1e9, None, True)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("profiled"), "mixtral")


@pytest.fixture(scope="module")
def profiled(pack, tmp_path_factory):
    """A report, the trace behind it, the model's own figures of the run, and the time it took outside."""
    folder = tmp_path_factory.mktemp("run")
    told = []
    with loaded(pack, [4] * NUM_LAYERS, prefetch=1, policy="decay") as model:
        before = model.stats
        begin_s = time.perf_counter()
        report = model.profile(
            [PROMPT, Prompt("again", PROMPT)],
            max_new_tokens=NEW_TOKENS,
            rates=RATES,
            measure_rates=False,
            trace=folder / "trace.npz",
            perfetto=folder / "times.json",
            on_prompt=lambda prompt, number, count: told.append((prompt.name, number, count)),
        )
        outside_s = time.perf_counter() - begin_s
        after = model.stats
    assert told == [("prompt 1", 1, 2), ("again", 2, 2)]
    assert (folder / "times.json").stat().st_size > 1000
    return report, read_trace(folder / "trace.npz"), before, after, outside_s


def test_the_parts_add_up_to_the_wall_clock(profiled):
    report, _, before, after, outside_s = profiled
    for split in (report.timing.decode, report.timing.prefill):
        parts_s = split.dense_s + split.router_s + split.wait_s + split.experts_s + split.other_s
        assert parts_s == pytest.approx(split.clock_s, rel=0.02)
        assert min(split.dense_s, split.router_s, split.wait_s, split.experts_s, split.other_s) >= 0
    inside_s = report.timing.decode.clock_s + report.timing.prefill.clock_s
    answers_s = (after.decode_s - before.decode_s) + (after.time_to_first_token_s - before.time_to_first_token_s)
    assert inside_s == pytest.approx(answers_s, rel=0.02, abs=0.002)
    assert inside_s < outside_s


def test_the_counts_are_the_models_own(profiled):
    report, trace, before, after, _ = profiled
    hits, misses = after.hits - before.hits, after.misses - before.misses
    assert sum(report.steps.requests) == hits + misses
    assert sum(report.steps.hits) == hits
    assert report.run.decode_tokens == after.new_tokens - before.new_tokens - 2  # a prompt's step gives one each
    assert report.run.prefill_tokens == after.prompt_tokens - before.prompt_tokens
    assert [sequence.name for sequence in report.run.sequences] == ["prompt 1", "again"]
    first_s = [sequence.time_to_first_token_s for sequence in report.run.sequences]
    assert sum(first_s) == pytest.approx(after.time_to_first_token_s - before.time_to_first_token_s)
    assert report.timing.decode.wait_s + report.timing.prefill.wait_s == pytest.approx(
        after.stall_s - before.stall_s, abs=0.005
    )
    assert int(trace.transfer_bytes.sum()) == pytest.approx(after.bytes_read - before.bytes_read, rel=0.2)


def test_it_knows_what_was_run(profiled, pack):
    report = profiled[0]
    run = report.run
    assert (run.source, run.format, run.policy, run.prefetch, run.device) == ("run", "nf4", "decay", "1", "cpu")
    assert (run.num_experts, run.num_slots) == ((NUM_EXPERTS,) * NUM_LAYERS, (4,) * NUM_LAYERS)
    assert run.rates == RATES
    assert run.machine.cores > 0
    assert "torch" in run.versions
    assert run.dense_bytes > 0
    assert report.header.exactness.text.startswith("exact at nf4")
    assert report.header.bound is not None
    assert report.prediction.distances[0] == 1
    assert report.levers is not None
    assert report.curves.today is not None
    assert ProfileReport.from_json(report.to_json()) == report
    assert "prompt" not in report.to_json().replace('"prompt_tokens"', "").replace('"prompt 1"', "")


def test_the_replay_of_today_is_what_the_cache_counted(pack):
    """Without prefetching, the curve at the run's slots is the run's hit ratio."""
    with loaded(pack, [4] * NUM_LAYERS, prefetch="off") as model:
        report = model.profile([" ".join([PROMPT] * 4)] * 2, max_new_tokens=NEW_TOKENS, measure_rates=False)
    assert report.curves.today.hit_ratio == pytest.approx(report.header.hit_ratio_decode, abs=1e-9)
    assert report.curves.measured_resident_ratio == report.header.hit_ratio_decode
    assert report.prediction is None
    assert report.header.bound is None
    assert {"bound", "prediction"} <= {item.section for item in report.missing}


def test_levers_foretell_the_hits_of_other_runs(pack):
    """The routing of a run does not depend on its cache, so that another run counts what the replay has foretold."""
    prompts = [" ".join([PROMPT] * 4), " ".join([PROMPT, PROMPT[:8]] * 2)]

    def run(num_slots: list[int], **settings: Any) -> ProfileReport:
        with loaded(pack, num_slots, prefetch="off", **settings) as model:
            return model.profile(prompts, max_new_tokens=NEW_TOKENS, measure_rates=False)

    report = run([3, 3, 3], policy="lru")
    more = next(lever for lever in report.levers.levers if lever.kind == "more_slots")
    slots = int(more.change.split()[0])  # of every layer alike: there are three
    assert run([slots] * NUM_LAYERS, policy="lru").header.hit_ratio_decode == pytest.approx(more.hit_ratio)
    for curve in report.curves.curves:
        if not curve.is_bound and curve.policy in policy_names():
            at = curve.slots.index(9)
            assert run([3, 3, 3], policy=curve.policy).header.hit_ratio_decode == pytest.approx(curve.hit_ratio[at])


def test_rates_are_measured_where_they_are_not_given(pack):
    with loaded(pack, [4] * NUM_LAYERS) as model:
        report = model.profile(max_new_tokens=3, rates=Rates(None, 123.0, None, None))
    assert [sequence.name for sequence in report.run.sequences] == [prompt.name for prompt in BUILT_IN]
    assert report.run.rates.disk_bytes_per_s == 123.0
    assert report.run.rates.memory_bytes_per_s > 1e6


def test_what_cannot_be_run_is_said(pack):
    with loaded(pack, [4] * NUM_LAYERS) as model:
        with pytest.raises(ConfigError, match="give a list"):
            model.profile("one text")
        with pytest.raises(ConfigError, match="no prompt to run"):
            model.profile([])
        with model.tracing(), pytest.raises(ConfigError, match="recorded already"):
            model.profile([PROMPT])


def test_prompts_are_parted_by_dashes():
    assert [prompt.text for prompt in parse_prompts("a\n\nb\n---\n---\n c\n")] == ["a\n\nb", " c"]
    for text in ("", "\n \n", "---\n---"):
        with pytest.raises(ConfigError, match="there is no prompt"):
            parse_prompts(text)


def test_experts_of_uneven_times_are_seen_where_they_are(profiled):
    """Every layer of every step has been timed."""
    trace = profiled[1]
    assert (trace.layer_us.sum(axis=2) > 0).all()
    assert np.array_equal(trace.step_tokens, np.bincount(trace.step))
