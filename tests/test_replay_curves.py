"""Hits against size: one pass or many, the numbers are the same."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_traces import naive_lru_hits, random_trace, token_events

from moe_offload.cache import RoutingTrace, kernels
from moe_offload.cache.replay import replay
from moe_offload.cache.replay_curves import Curve, belady_curve, curve, lru_curve
from moe_offload.errors import ConfigError


@given(
    st.integers(0, 10_000),
    st.integers(1, 4),
    st.integers(0, 6),
    st.sampled_from([0.0, 0.3]),
)
@settings(max_examples=60, deadline=None)
def test_one_pass_gives_lru_at_every_size(seed: int, top_k: int, prompt_tokens: int, unknown: float):
    trace = random_trace(
        seed, num_tokens=80, num_experts=9, top_k=top_k, prompt_tokens=prompt_tokens, num_sequences=3, unknown=unknown
    )
    found = lru_curve(trace)
    assert found.sizes == tuple(range(found.sizes[0], 10))
    for index, size in enumerate(found.sizes):
        layers = replay(trace, policy="lru", num_slots=size, counting="token").stats.layers
        assert found.hits[index].tolist() == [[layer.prefill.hits, layer.decode.hits] for layer in layers]
        assert found.requests.tolist() == [[layer.prefill.requests, layer.decode.requests] for layer in layers]
        events = token_events(trace)
        assert found.hits[index].sum(1).tolist() == [naive_lru_hits(events, idx, size) for idx in range(2)]


def test_one_pass_runs_alike_in_python(monkeypatch: pytest.MonkeyPatch):
    trace = random_trace(4, prompt_tokens=4, num_sequences=3, num_experts=20, top_k=4)
    fast = lru_curve(trace)
    monkeypatch.setattr(kernels, "library", lambda: None)
    with pytest.warns(RuntimeWarning, match="was not built"):
        slow = lru_curve(trace)
    np.testing.assert_array_equal(fast.hits, slow.hits)
    np.testing.assert_array_equal(fast.requests, slow.requests)


def test_layers_of_different_sizes():
    experts = random_trace(6, num_layers=2, num_experts=6).experts
    trace = RoutingTrace(experts=experts, num_experts=np.array([6, 9]))
    found = lru_curve(trace)
    assert found.sizes == (3, 4, 5, 6, 7, 8, 9)
    assert (found.hits[3:] == found.hits[3]).all()
    asked = [set(experts[:, layer_idx].reshape(-1).tolist()) for layer_idx in range(2)]
    assert found.hits[-1, :, 1].tolist() == [600 - len(experts) for experts in asked]
    np.testing.assert_array_equal(curve(trace, "decay", [9]).hits, found.hits[-1:])


@pytest.mark.parametrize("policy", ["lru", "lfu", "decay", "belady"])
@pytest.mark.parametrize("counting", ["run", "token"])
def test_a_curve_is_what_replay_counts(policy: str, counting: str):
    trace = random_trace(7, prompt_tokens=5, num_sequences=4)
    found = curve(trace, policy, [2, 5, 9], counting=counting)
    for index, size in enumerate(found.sizes):
        result = replay(trace, policy=policy, num_slots=size, counting=counting)
        assert found.hit_ratio("decode")[index] == result.hit_ratio("decode")
        assert found.hit_ratio("prefill")[index] == result.hit_ratio("prefill")
        layers = [layer.decode.hit_ratio for layer in result.stats.layers]
        assert found.layer_hit_ratio("decode")[index].tolist() == layers


def test_belady_lies_above_and_rises():
    trace = random_trace(8, num_tokens=400, num_experts=32, top_k=4)
    best, lru = belady_curve(trace), curve(trace, "lru")
    assert best.sizes == lru.sizes
    assert (best.sizes[0], best.sizes[-1], len(best.sizes)) == (4, 32, 16)
    assert (np.diff(best.hit_ratio()) >= 0).all()
    assert all(a >= b for a, b in zip(best.hit_ratio(), lru.hit_ratio(), strict=True))
    assert best.hit_ratio()[-1] == lru.hit_ratio()[-1]


def test_the_knee_is_where_the_curve_bends():
    def at(*ratios: float) -> int:
        hits = np.zeros((len(ratios), 1, 2), np.int64)
        hits[:, 0, 1] = np.array(ratios) * 1000
        return Curve("lru", tuple(range(2, 2 + len(ratios))), hits, np.array([[0, 1000]])).knee()

    assert at(0.2, 0.5, 0.8, 0.82, 0.84, 0.86) == 4
    assert at(0.2, 0.7, 0.72, 0.75) == 3
    assert at(0.5) == 2


def test_one_pass_is_refused_where_it_would_be_wrong():
    trace = random_trace(1, prompt_tokens=3)
    with pytest.raises(ConfigError, match='use curve\\(trace, "lru"\\), or counting="token"'):
        lru_curve(trace, counting="run")
    assert lru_curve(random_trace(1), counting="run").sizes == tuple(range(3, 13))


@pytest.mark.parametrize("sizes", [[], [0, 3], [13]])
def test_sizes_that_there_are_not(sizes: list[int]):
    with pytest.raises(ConfigError, match=r"sizes must lie in 1\.\.12"):
        curve(random_trace(1), "lru", sizes)
