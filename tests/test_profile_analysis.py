"""The figures of a profile, against straightforward computations and against what must hold of any."""

import math
from collections import Counter, OrderedDict
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
from profile_samples import bare, sample_report, slow_sample_report, without
from synthetic_trace import EXPERT_BYTES, synthetic_trace

from moe_offload.cache.trace import Outcome, RoutingTrace, TransferKind
from moe_offload.errors import ReportError
from moe_offload.offload.bench.report import MachineRates, RunFigures, bound
from moe_offload.offload.profiling.analyse import analyse
from moe_offload.offload.profiling.intervals import union_us
from moe_offload.offload.profiling.report import ProfileReport
from moe_offload.offload.profiling.run_facts import Rates
from moe_offload.offload.profiling.sections import Lever

TRACE = synthetic_trace()


def requests_by_hand(trace: RoutingTrace) -> dict[tuple[int, int, int], int]:
    """(step, layer, expert) -> outcome."""
    found: dict[tuple[int, int, int], int] = {}
    for token in range(trace.num_tokens):
        for layer in range(trace.num_layers):
            for rank in range(trace.top_k):
                key = (int(trace.step[token]), layer, int(trace.experts[token, layer, rank]))
                found[key] = int(trace.outcome[token, layer, rank])
    return found


def is_decode_step(trace: RoutingTrace) -> dict[int, bool]:
    return {int(step): bool(phase) for step, phase in zip(trace.step, trace.phase, strict=True)}


def test_counts_are_those_of_every_request_by_itself():
    report, decode = sample_report(), is_decode_step(TRACE)
    requests = requests_by_hand(TRACE)
    asked = {key: outcome for key, outcome in requests.items() if decode[key[0]]}
    hits = {key for key, outcome in asked.items() if outcome <= Outcome.LATE}
    assert report.header.hit_ratio_decode == pytest.approx(len(hits) / len(asked))
    read = {key: outcome for key, outcome in requests.items() if not decode[key[0]]}
    read_hits = sum(outcome <= Outcome.LATE for outcome in read.values())
    assert report.header.hit_ratio_prefill == pytest.approx(read_hits / len(read))
    by_expert, hits_by_expert = Counter(key[1:] for key in asked), Counter(key[1:] for key in hits)
    for layer in range(TRACE.num_layers):
        figures = report.layers[layer]
        assert report.usage.requests[layer] == tuple(by_expert[layer, expert] for expert in range(8))
        assert report.usage.hits[layer] == tuple(hits_by_expert[layer, expert] for expert in range(8))
        assert (figures.requests, figures.hits) == (sum(report.usage.requests[layer]), sum(report.usage.hits[layer]))
        assert figures.misses == figures.requests - figures.hits
        assert figures.late == sum(k[1] == layer and outcome == Outcome.LATE for k, outcome in asked.items())
    by_step = Counter(step for step, _, _ in requests)
    assert report.steps.requests == tuple(by_step[step] for step in range(len(TRACE.step_us)))


def test_uses_are_tokens():
    report = sample_report()
    for name, phase in (("prefill_uses", 0), ("decode_uses", 1)):
        for layer, row in enumerate(getattr(report.usage, name)):
            chosen = TRACE.experts[TRACE.phase == phase, layer]
            assert row == tuple(int((chosen == expert).sum()) for expert in range(8))
    assert report.run.prefill_tokens == 62
    assert report.run.decode_tokens == 60
    assert [(s.name, s.prompt_tokens, s.decode_tokens) for s in report.run.sequences] == [
        ("English", 20, 20),
        ("code", 12, 20),
        ("maths", 30, 20),
    ]


def test_times_add_up_to_the_clock():
    report = sample_report()
    for split in (report.timing.decode, report.timing.prefill):
        parts = split.dense_s + split.router_s + split.wait_s + split.experts_s + split.other_s
        assert parts == pytest.approx(split.accounted_share * split.clock_s)
        assert split.accounted_share == pytest.approx(1.0, abs=0.02)
    steps = report.steps
    for parts in zip(steps.dense_s, steps.router_s, steps.wait_s, steps.experts_s, steps.other_s, steps.wall_s,
                     strict=True):  # fmt: skip
        assert sum(parts[:5]) == pytest.approx(parts[5])
    wait_s = [s for s, phase in zip(steps.wait_s, steps.phase, strict=True) if phase == "decode"]
    assert report.timing.decode.wait_s == pytest.approx(sum(wait_s)) == sum(x.wait_s for x in report.layers)
    assert report.header.stall_share == pytest.approx(sum(wait_s) / report.timing.decode.clock_s)


def test_time_that_no_step_has_is_not_accounted_for():
    begins = TRACE.step_begin_us + np.arange(len(TRACE.step_us)) * 1000  # a millisecond lost after every step
    split = analyse(replace(TRACE, step_begin_us=begins)).timing.decode
    assert split.accounted_share < 0.9


def test_the_pause_between_sequences_is_nobodys():
    pause_us = (
        np.cumsum(np.diff(TRACE.sequence[np.searchsorted(TRACE.step, range(len(TRACE.step_us)))], prepend=0)) * 10**7
    )
    later = analyse(replace(TRACE, step_begin_us=TRACE.step_begin_us + pause_us))
    assert later.timing == sample_report().timing


def test_many_steps_are_drawn_as_sums_of_neighbours():
    trace = synthetic_trace(num_layers=2, prompt_tokens=(3, 4), new_tokens=800)
    steps = analyse(trace).steps
    assert steps.steps_per_point == 2
    assert len(steps.first_step) == 802
    assert sum(steps.num_steps) == len(trace.step_us)
    assert sum(steps.num_tokens) == trace.num_tokens
    assert sum(steps.wall_s) == pytest.approx(trace.step_us.sum() / 1e6)
    assert [steps.phase[i] for i in (0, 1, 401)] == ["prefill", "decode", "prefill"]


def test_bytes_are_those_of_transfers_in_decode():
    report, decode = sample_report(), is_decode_step(TRACE)
    total = Counter()
    for begin, kind, size in zip(TRACE.transfer_begin_us, TRACE.transfer_kind, TRACE.transfer_bytes, strict=True):
        step = max(i for i, at in enumerate(TRACE.step_begin_us) if at <= begin)
        if decode[step]:
            total[int(kind)] += int(size)
    assert report.header.disk_bytes_per_token == sum(total.values()) / 60
    assert report.prediction.demand_bytes == total[TransferKind.DEMAND]
    assert report.prediction.wasted_bytes == total[TransferKind.WASTED]
    assert report.prediction.used_bytes + report.prediction.late_bytes == total[TransferKind.USED]
    assert report.header.pcie_bytes_per_token is None


def test_without_transfers_bytes_come_from_outcomes():
    report = analyse(without(TRACE, "transfer_"))
    moved = sum(o != Outcome.RESIDENT for (s, _, _), o in requests_by_hand(TRACE).items() if is_decode_step(TRACE)[s])
    assert report.header.disk_bytes_per_token == moved * EXPERT_BYTES / 60
    assert report.prediction.wasted_bytes is None
    on_gpu = analyse(replace(without(TRACE, "transfer_"), meta=dict(TRACE.meta) | {"device": "cuda:0"}))
    assert on_gpu.header.pcie_bytes_per_token == moved * EXPERT_BYTES / 60
    assert on_gpu.header.disk_bytes_per_token is None


def test_prediction_is_counted_token_by_token():
    right, asked, named = Counter(), Counter(), Counter()
    for token in np.flatnonzero(TRACE.phase == 1):
        for layer in range(TRACE.num_layers):
            for index in range(2):
                guess = set(TRACE.predicted[token, layer, index].tolist()) - {-1}
                if guess:
                    chosen = set(TRACE.experts[token, layer].tolist())
                    for key in ((index,), (index, layer)):
                        right[key] += len(guess & chosen)
                        asked[key] += len(chosen)
                        named[key] += len(guess)
    found = sample_report().prediction
    assert found.distances == (1, 2)
    for index in range(2):
        assert found.recall[index] == pytest.approx(right[index,] / asked[index,])
        assert found.precision[index] == pytest.approx(right[index,] / named[index,])
    for layer in range(TRACE.num_layers):
        for index in range(2):
            if layer <= index:
                assert found.layer_recall[layer][index] is None
            else:
                assert found.layer_recall[layer][index] == pytest.approx(right[index, layer] / asked[index, layer])


def test_a_hit_that_nothing_predicted_is_not_held_against_the_predictions_precision():
    predicted = TRACE.predicted.copy()
    predicted[..., 1] = -1
    found = analyse(replace(TRACE, predicted=predicted)).prediction
    assert found.recall[0] < 0.5 < found.precision[0]


def test_repetition_of_neighbours_in_one_sequence():
    first, any_, share = [], [], []
    for a, b in pairwise(range(TRACE.num_tokens)):
        if TRACE.phase[a] == TRACE.phase[b] == 1 and TRACE.sequence[a] == TRACE.sequence[b]:
            now, after = TRACE.experts[a, 2].tolist(), TRACE.experts[b, 2].tolist()
            first.append(now[0] == after[0])
            any_.append(bool(set(now) & set(after)))
            share.append(len(set(now) & set(after)) / 2)
    found = sample_report().experts.repetition
    assert len(first) == 57
    assert (found.first[2], found.any[2], found.share[2]) == pytest.approx(
        (np.mean(first), np.mean(any_), np.mean(share))
    )
    pairs = list(combinations(range(8), 2))
    by_chance = np.mean([bool(set(a) & set(b)) for a in pairs for b in pairs])
    assert found.random_any[0] == pytest.approx(by_chance)
    assert (found.random_first[0], found.random_share[0]) == (1 / 8, 2 / 8)


def test_load_entropy_and_gini():
    trace = RoutingTrace(np.array([[[0]], [[0]], [[1]], [[2]]]), num_experts=np.array([4]))
    load = analyse(trace).experts.load[0]
    assert load.entropy_bits == pytest.approx(1.5)
    assert load.max_entropy_bits == 2
    assert (load.largest_share, load.busiest_expert, load.unused) == (0.5, 0, 1)
    counts = (2, 1, 1, 0)
    differences = sum(abs(a - b) for a in counts for b in counts)
    assert load.gini == pytest.approx(differences / (2 * 4 * 4 * np.mean(counts)))


def test_coactivation_is_what_follows_what():
    found = sample_report().experts.coactivation
    decode = TRACE.experts[TRACE.phase == 1]
    chart = found.maps[1]
    for i, expert in enumerate(chart.experts):
        with_it = decode[(decode[:, chart.layer] == expert).any(axis=1)]
        for j, following in enumerate(chart.next_experts):
            expected = (with_it[:, chart.next_layer] == following).any(axis=1).mean() if len(with_it) else 0.0
            assert chart.probability[i][j] == pytest.approx(expected, abs=1e-4)
    pair = found.strongest[0]
    together = (decode[:, pair.layer] == pair.expert).any(axis=1) & (decode[:, pair.layer + 1] == pair.next_expert).any(
        axis=1
    )
    assert pair.tokens == together.sum()


def test_a_layer_that_follows_from_the_one_before_is_foreseen():
    draw = np.random.default_rng(0)
    first = draw.integers(0, 16, (400, 1))
    experts = np.stack([first, (first * 5 + 3) % 16, draw.integers(0, 16, (400, 1))], axis=1)
    found = analyse(RoutingTrace(experts)).experts.coactivation
    assert found.recall[0] == 1.0
    assert found.base_recall[0] < 0.2
    assert found.recall[1] < 0.2
    assert found.strongest[0].layer == 0
    assert found.strongest[0].lift == pytest.approx(16, rel=0.5)


def lru_hit_ratio(experts: np.ndarray, num_slots: int) -> float:
    hits = 0
    slots = [OrderedDict() for _ in range(experts.shape[1])]
    for token in experts:
        for layer, chosen in enumerate(token.tolist()):
            hits += sum(expert in slots[layer] for expert in chosen)
            for expert in reversed(chosen):
                slots[layer][expert] = None
                slots[layer].move_to_end(expert)
            while len(slots[layer]) > num_slots:
                slots[layer].popitem(last=False)
    return hits / experts.size


def test_curves_are_those_of_a_cache_run_by_hand_and_belady_is_above_all():
    decode = TRACE.experts[TRACE.phase == 1]
    found = analyse(RoutingTrace(decode, num_experts=TRACE.num_experts)).curves
    curves = {curve.policy: curve for curve in found.curves}
    for slots, ratio in zip(curves["lru"].slots, curves["lru"].hit_ratio, strict=True):
        assert ratio == pytest.approx(lru_hit_ratio(decode, slots // 6), abs=0.01)  # of equals, any may go
    for curve in found.curves:
        assert list(curve.hit_ratio) == sorted(curve.hit_ratio) or curve.policy != "lru"
        assert all(b >= a - 1e-12 for a, b in zip(curve.hit_ratio, curves["belady"].hit_ratio, strict=True))
        assert curve.is_bound == (curve.policy == "belady")
        assert curve.resident_share[-1] == 1
    assert found.today is None


def test_today_is_the_runs_own_budget():
    report = sample_report()
    today = report.curves.today
    assert today.slots == 30
    assert today.resident_bytes == 30 * EXPERT_BYTES
    own = next(curve for curve in report.curves.curves if curve.policy == "decay")
    assert today.hit_ratio == own.hit_ratio[own.slots.index(30)]
    assert report.curves.measured_hit_ratio == report.header.hit_ratio_decode
    assert report.curves.measured_resident_ratio < report.curves.measured_hit_ratio


def test_the_knee_is_on_the_best_curve_and_a_line_has_none():
    report = sample_report()
    best = max((c for c in report.curves.curves if not c.is_bound), key=lambda c: sum(c.hit_ratio))
    assert report.curves.knee_policy == best.policy
    at = best.slots.index(report.curves.knee.slots)
    assert (best.hit_ratio[at], best.resident_bytes[at]) == (
        report.curves.knee.hit_ratio,
        report.curves.knee.resident_bytes,
    )
    slope = np.subtract(best.hit_ratio, np.interp(best.slots, best.slots[::6], best.hit_ratio[::6]))
    assert slope.argmax() == at
    two = analyse(RoutingTrace(np.array([[[0]], [[1]], [[0]]])))  # with one slot or two: no room for a knee
    assert two.curves.knee is None


def test_residency_is_that_of_the_cache_of_the_run():
    """The trace's cache is LRU, which the reconstruction gets right in every slot."""
    trace = synthetic_trace(num_layers=2, prompt_tokens=(1,), new_tokens=24)
    frames = analyse(trace).usage.residency
    assert frames.first_token == tuple(range(24))
    slots: OrderedDict[int, None] = OrderedDict()
    for token, chosen in enumerate(trace.experts[:, 0].tolist()):
        for expert in sorted(chosen):  # as the trace's cache takes them
            slots[expert] = None
            slots.move_to_end(expert)
        while len(slots) > 5:
            slots.popitem(last=False)
        if token:
            assert frames.frames[token - 1][0] == "".join("9" if expert in slots else "0" for expert in range(8))


def test_starving_layers_are_those_that_miss_more_than_their_share():
    outcome = np.zeros((200, 4, 2), np.uint8)
    outcome[:, 2] = Outcome.MISSED
    outcome[::20] = Outcome.MISSED
    draw = np.random.default_rng(0)
    experts = np.argsort(draw.random((200, 4, 8)), -1)[..., :2]
    report = analyse(RoutingTrace(experts, outcome=outcome))
    assert [layer.starving for layer in report.layers] == [False, False, True, False]
    assert sum(layer.miss_share for layer in report.layers) == pytest.approx(1)


def test_levers_follow_from_the_runs_own_figures():
    report = slow_sample_report()
    levers = {lever.kind: lever for lever in report.levers.levers}
    assert [lever.gain for lever in report.levers.levers] == sorted(
        (lever.gain for lever in levers.values()), reverse=True
    )
    split, curves = report.timing.decode, report.curves
    work_s, wait_s = (split.clock_s - split.wait_s) / 60, split.wait_s / 60
    assert report.levers.modelled_tokens_per_s == pytest.approx(report.header.tokens_per_s)
    assert levers["faster_disk"].tokens_per_s == pytest.approx(1 / (work_s + wait_s / 2))
    more = levers["more_slots"]
    own = next(curve for curve in curves.curves if curve.policy == "decay")
    slots = max(round(1.25 * 18), curves.knee.slots)
    assert more.hit_ratio == pytest.approx(np.interp(slots, own.slots, own.hit_ratio))
    factor = (1 - more.hit_ratio) / (1 - curves.today.hit_ratio)
    assert more.tokens_per_s == pytest.approx(1 / (work_s + wait_s * factor))
    assert more.gain == pytest.approx(more.tokens_per_s / report.header.tokens_per_s - 1)
    needed_gib = (256 * 1024**2 + (slots - 18) * EXPERT_BYTES) / 1024**3
    assert more.option == f"--ram {math.ceil(needed_gib * 1000) / 1000:.3f}GiB"
    fewer = levers["fewer_bits"]
    assert fewer.option == "--format nf3"
    assert "loss of quality" in fewer.sentence
    assert levers["prefetch"].option == "--prefetch off"
    # The best of those that change no answer.
    assert report.levers.next == next(each.sentence for each in report.levers.levers if each.kind != "fewer_bits")


def test_no_lever_is_named_where_nothing_waits():
    layer_us = TRACE.layer_us.copy()
    layer_us[..., 3] += layer_us[..., 2]
    layer_us[..., 2] = 0
    levers = analyse(replace(TRACE, layer_us=layer_us)).levers
    assert levers.next == "No change to the cache is worth it: waiting for experts takes 0% of the time"


def test_prefetching_is_proposed_where_it_is_off():
    off = replace(without(TRACE, "predicted", "distance"), meta=dict(TRACE.meta) | {"prefetch": "off"})
    report = analyse(off)
    assert lever(report, "prefetch").gain > 0
    assert lever(report, "prefetch").option == "--prefetch auto"
    assert report.prediction is None
    assert {"prediction": "nothing was prefetched (--prefetch off)"}.items() <= {
        item.section: item.reason for item in report.missing
    }.items()


def lever(report: ProfileReport, kind: str) -> Lever:
    return next(lever for lever in report.levers.levers if lever.kind == kind)


def test_more_slots_than_the_machine_has_memory_for_are_no_option():
    machine = {"cpu": "x", "cores": 1, "threads": 1, "kernels": "x", "memory_bytes": 256 * 1024**2 + 1}
    found = lever(analyse(replace(TRACE, meta=dict(TRACE.meta) | {"machine": machine})), "more_slots")
    assert found.option is None
    assert found.change.endswith("beyond this machine's 256 MiB")


def test_a_faster_disk_helps_a_gpu_as_far_as_it_reads_from_it():
    meta = dict(TRACE.meta) | {"device": "cuda", "vram_bytes": 1024**3}
    report = analyse(replace(TRACE, meta=meta))
    share = report.header.disk_bytes_per_token / report.header.pcie_bytes_per_token
    found = lever(report, "faster_disk")
    if share >= 1:
        assert found.formula == "waiting / 2"
    few = replace(TRACE, meta=meta, transfer_bytes=TRACE.transfer_bytes // 8)
    report = analyse(few)
    share = report.header.disk_bytes_per_token / report.header.pcie_bytes_per_token
    split = report.timing.decode
    wait_s = split.wait_s * (1 - share / 2)
    assert share < 0.5
    assert lever(report, "faster_disk").tokens_per_s == pytest.approx(60 / (split.clock_s - split.wait_s + wait_s))
    assert lever(report, "more_slots").option.startswith("--vram 1.")


def test_fewer_bits_go_by_the_bits_that_weights_have():
    as_recorded = lever(analyse(replace(TRACE, meta=dict(TRACE.meta) | {"format": "source", "expert_bits": 16.0})),
                        "fewer_bits")  # fmt: skip
    assert as_recorded.option == "--format int8"
    kinds = {
        lever.kind for lever in analyse(replace(TRACE, meta=dict(TRACE.meta) | {"format": "source"})).levers.levers
    }
    assert "fewer_bits" not in kinds


def test_the_bound_is_the_benchmarks():
    report = sample_report()
    needed = [kind != TransferKind.WASTED for kind in TRACE.transfer_kind.tolist()]
    decode = is_decode_step(TRACE)
    steps = np.searchsorted(TRACE.step_begin_us, TRACE.transfer_begin_us, side="right") - 1
    missed = sum(
        EXPERT_BYTES for is_needed, step in zip(needed, steps.tolist(), strict=True) if is_needed and decode[step]
    )
    run = RunFigures(
        "", 0, 0.5, 0, None, 0, tokens=60, elapsed_s=1, median_step_s=None, hit_ratio=0, bytes_read=0,
        bytes_missed=missed, stall_s=0, prefetch_recall=0, prefetch_issued=0, prefetch_wasted=0,
        expert_bytes_per_token=12 * EXPERT_BYTES, dense_bytes_per_token=12_000_000, kv_bytes_per_token=200_000,
        operations=None, rates=MachineRates(1, 1, True),
    )  # fmt: skip
    for memory, disk in ((18e9, 2.4e9), (18e9, 2e8)):
        figures = analyse(TRACE, rates=Rates(memory, disk, None, True)).header.bound
        expected = bound(run, MachineRates(memory, disk, True), "decode")
        assert (figures.tokens_per_s, figures.by) == (pytest.approx(expected.tokens_per_s), expected.by)
        assert figures.share == pytest.approx(report.header.tokens_per_s / expected.tokens_per_s)


def test_an_empty_trace_is_refused():
    for experts in (np.zeros((0, 2, 2), np.int16), np.full((3, 2, 2), -1), np.zeros((3, 0, 2), np.int16)):
        with pytest.raises(ReportError, match="the trace is empty"):
            analyse(RoutingTrace(experts))


def test_what_a_trace_lacks_is_said_instead_of_zeros():
    report = analyse(bare(TRACE))
    assert (report.timing, report.levers, report.prediction, report.usage.hits, report.usage.residency) == (None,) * 5
    assert report.header.tokens_per_s is report.header.hit_ratio_decode is report.header.stall_share is None
    assert report.layers[0].hit_ratio is report.layers[0].wait_s is report.steps.wall_s is report.steps.hits is None
    sections = {item.section for item in report.missing}
    assert sections == {
        "tokens_per_s", "time_to_first_token_s", "hit_ratio_decode", "hit_ratio_prefill", "disk_bytes_per_token",
        "pcie_bytes_per_token", "bound", "timing", "link", "levers", "prediction", "residency",
    }  # fmt: skip
    assert report.run.prefill_steps == 3
    assert report.run.decode_steps == 60


def test_outcomes_that_are_all_unknown_are_none():
    unknown = np.full_like(TRACE.outcome, Outcome.UNKNOWN)
    report = analyse(replace(TRACE, outcome=unknown))
    assert report.usage.hits is None
    assert report.header.hit_ratio_decode is None
    assert report.timing is not None


def test_a_trace_of_prompts_alone():
    prompt = np.flatnonzero(TRACE.phase == 0)
    trace = RoutingTrace(TRACE.experts[prompt], sequence=TRACE.sequence[prompt], phase=TRACE.phase[prompt])
    report = analyse(trace)
    assert report.run.decode_steps == 0
    assert sum(map(sum, report.usage.decode_uses)) == 0
    assert report.experts.load[0].entropy_bits > 0
    assert report.experts.repetition.first[0] is not None


def test_meta_that_others_wrote_is_not_believed():
    wild = {"model": 3, "rates": [1], "machine": {"cores": -1, "cpu": 5}, "ram_bytes": 1e300, "versions": {"a": 1},
            "prefetch": {}, "time_to_first_token_s": ["x", float("inf")], "sequence_names": [None] * 9}  # fmt: skip
    report = analyse(replace(TRACE, meta=wild))
    assert report.run.model == "unnamed model"
    assert report.run.ram_bytes is None
    assert report.run.machine.cores == 0
    assert report.header.bound is None
    report.to_json()


@pytest.mark.parametrize(("begin", "end", "length"), [([], [], 0), ([0, 5], [3, 9], 7), ([2, 0, 1], [4, 10, 2], 10)])
def test_time_covered_by_intervals(begin, end, length):
    assert union_us(np.array(begin, np.int64), np.array(end, np.int64)) == length
