"""Simulated seconds: examples that can be worked out by hand, and what must hold of any."""

import numpy as np
import pytest
from replay_traces import random_trace

from moe_offload.cache import RoutingTrace, kernels
from moe_offload.cache.replay import replay
from moe_offload.cache.replay_result import ReplayResult
from moe_offload.cache.replay_timing import Lookahead, Rates, measured_rates
from moe_offload.errors import ConfigError

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="the library was not built")

# An expert takes 1 s over the link.
RATES = Rates(link_bytes_per_s=100.0, before_s=0.5, experts_s=0.2, other_s=0.25)


def timed(experts: list, rates: Rates = RATES, recall: float = 0.0, precision: float = 1.0, **options) -> ReplayResult:
    trace = RoutingTrace(experts=np.array(experts), expert_bytes=np.full(len(experts[0]), 100))
    return replay(trace, policy="lru", rates=rates, lookahead=Lookahead(recall, precision), **options)


def test_a_token_whose_experts_are_resident_waits_for_nothing():
    time = timed([[[0, 1], [0, 1]]] * 11, num_slots=2).time
    first = 0.25 + 2 * (0.5 + 2 * 1.0 + 0.1)  # the last expert is computed when it has come
    assert time.decode_s == pytest.approx(first + 10 * (0.25 + 2 * 0.7))
    assert time.decode_wait_s == pytest.approx(2 * (2 * 1.0 + 0.1 - 0.2))
    assert time.prefill_s == 0


def test_what_is_resident_is_computed_while_the_rest_comes():
    rates = Rates(100.0, experts_s=4.0)
    # The second token misses one of two: 2 s of computing cover the 1 s of its transfer.
    time = timed([[[0, 1]], [[1, 2]]], rates, num_slots=2).time
    assert time.decode_s == pytest.approx((1 + 2 + 2) + 4.0)
    assert time.layer_wait_s == pytest.approx((1.0,))


def test_layers_may_differ():
    rates = Rates(50.0, before_s=(1.0, 2.0), experts_s=(0.0, 4.0))
    trace = RoutingTrace(experts=np.zeros((2, 2, 1), np.int16), expert_bytes=np.array([100, 200]))
    time = replay(trace, policy="lru", num_slots=1, rates=rates).time
    assert time.decode_s == pytest.approx((1 + 2) + (2 + 4 + 4) + 1 + (2 + 4))
    assert time.layer_wait_s == pytest.approx((2.0, 4.0))


def test_perfect_foresight_hides_what_there_is_time_for():
    rates = Rates(100.0, before_s=3.0, experts_s=0.0)
    experts = [[[0], [0]], [[1], [1]], [[0], [0]]]
    blind, seeing = timed(experts, rates, num_slots=1), timed(experts, rates, recall=1.0, num_slots=1)
    assert blind.time.decode_s == pytest.approx(3 * (4 + 4))
    # The first layer of a token is not foreseen; the second one's expert comes while its router is waited for.
    assert seeing.time.decode_s == pytest.approx(3 * (4 + 3))
    assert [(c.issued, c.used, c.late, c.wasted) for c in seeing.time.prefetch] == [(0, 0, 0, 0), (3, 3, 0, 0)]
    assert seeing.stats == blind.stats


def test_without_time_a_prefetch_is_late_and_still_earlier():
    rates = Rates(100.0, before_s=0.25)
    seeing = timed([[[0], [0]]], rates, recall=1.0, num_slots=1)
    # asked at 0.25 s, fetched by 1.25 s; the guess follows on the link at once, while the layers pass
    assert seeing.time.decode_s == pytest.approx(2.25)
    assert seeing.time.prefetch[1].late == 1
    assert timed([[[0], [0]]], rates, num_slots=1).time.decode_s == pytest.approx(2.5)


def test_wrong_guesses_cost_bytes_and_are_dropped_when_the_router_has_chosen():
    rates = Rates(100.0, before_s=2.5)
    experts = [[[0], [0]], [[1], [1]]]
    result = timed(experts, rates, recall=1.0, precision=0.25, num_slots=1)
    # 3 wrong ones for each right one; after the right one there is time for one of them and part of another
    assert [(c.issued, c.used, c.wasted) for c in result.time.prefetch] == [(0, 0, 0), (6, 2, 4)]
    assert result.layer_bytes() == (200, 600)
    assert timed(experts, rates, num_slots=1).layer_bytes() == (200, 200)


def test_recall_is_the_share_that_is_foreseen():
    experts = np.random.default_rng(3).permuted(np.tile(np.arange(12), (2000, 3, 1)), axis=2)[:, :, :3]
    trace = RoutingTrace(experts=experts, expert_bytes=np.full(3, 100))
    rates = Rates(1e9, before_s=1.0)
    result = replay(trace, policy="lru", num_slots=4, rates=rates, lookahead=Lookahead(0.7))
    for counts, layer in zip(result.time.prefetch[1:], result.stats.layers[1:], strict=True):
        assert counts.used / layer.decode.misses == pytest.approx(0.7, abs=0.03)


def test_more_foresight_is_never_slower():
    trace = random_trace(9, num_tokens=300, num_layers=4, expert_bytes=np.full(4, 100))
    times = [
        replay(trace, policy="lru", num_slots=4, rates=RATES, lookahead=Lookahead(recall)).time.decode_s
        for recall in (0.0, 0.5, 1.0)
    ]
    assert times == sorted(times, reverse=True)


def test_prompts_are_transfers_and_nothing_else():
    trace = random_trace(4, num_tokens=30, prompt_tokens=20, expert_bytes=np.full(2, 100))
    result = replay(trace, policy="lru", num_slots=4, rates=RATES)
    fetched = sum(layer.prefill.misses + layer.prefill.bypassed for layer in result.stats.layers)
    assert result.time.prefill_s == pytest.approx(fetched * 1.0)
    assert result.seconds_per_token == result.time.decode_s / 10


def test_a_link_that_is_fast_enough_leaves_the_layers():
    trace = random_trace(4, num_tokens=50, expert_bytes=np.full(2, 100))
    rates = Rates(1e18, before_s=0.5, experts_s=0.2, other_s=0.25)
    result = replay(trace, policy="lru", num_slots=4, rates=rates)
    assert result.seconds_per_token == pytest.approx(0.25 + 2 * 0.7)


def test_times_of_the_layers_are_the_averages_of_the_trace():
    layer_us = np.array([[[100, 10, 7, 50]] * 2, [[200, 20, 9, 60]] * 2, [[9000, 9, 9, 9]] * 2], np.uint32)
    trace = RoutingTrace(
        experts=np.zeros((3, 2, 1), np.int16),
        phase=np.array([1, 1, 0], np.uint8),
        step=np.arange(3),
        step_begin_us=np.arange(3) * 10_000,
        step_us=np.array([400, 600, 20_000], np.uint32),
        step_tokens=np.ones(3, np.int32),
        layer_us=layer_us,
    )
    rates = measured_rates(trace, 1e9)
    assert rates.before_s == pytest.approx((165e-6, 165e-6))
    assert rates.experts_s == pytest.approx((55e-6, 55e-6))
    assert rates.other_s == pytest.approx((66 + 22) / 2 * 1e-6)
    assert measured_rates(random_trace(1), 1e9) == Rates(1e9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rates(0.0), "brings nothing"),
        (lambda: Lookahead(recall=1.5), "recall 1.5"),
        (lambda: Lookahead(precision=0.0), "precision 0.0"),
        (lambda: replay(random_trace(1), num_slots=4, rates=RATES), "does not tell how large its experts are"),
        (lambda: replay(random_trace(1), num_slots=4, lookahead=Lookahead(0.5)), "give rates too"),
        (lambda: replay(random_trace(1), num_slots=4, expert_bytes=[1, 2, 3]), "one for each of 2"),
        (
            lambda: replay(random_trace(1), num_slots=4, expert_bytes=9, rates=Rates(1.0, before_s=(1.0,) * 3)),
            "3 times for 2 layers",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message: str):
    with pytest.raises(ConfigError, match=message):
        make()


def test_seconds_need_the_library(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "library", lambda: None)
    with pytest.warns(RuntimeWarning), pytest.raises(ConfigError, match="which was not built"):
        replay(random_trace(1), num_slots=4, expert_bytes=9, rates=RATES)
