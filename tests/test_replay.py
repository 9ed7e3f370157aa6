"""Replay against the running cache, and against references without any cleverness."""

import dataclasses
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from replay_traces import most_hits, naive_lru_hits, random_trace, token_events

from moe_offload.cache import Admit, EventKind, ExpertCache, RoutingTrace, kernels, policy_names
from moe_offload.cache.replay import belady, replay, replay_policies, share_of_slots
from moe_offload.cache.replay_events import events_of
from moe_offload.cache.replay_result import ReplayResult
from moe_offload.errors import ConfigError

traces = st.builds(
    random_trace,
    st.integers(0, 10_000),
    num_tokens=st.integers(1, 60),
    num_layers=st.integers(1, 3),
    num_experts=st.integers(4, 12),
    top_k=st.integers(1, 4),
    prompt_tokens=st.integers(0, 6),
    num_sequences=st.integers(1, 4),
    unknown=st.sampled_from([0.0, 0.2]),
    weighted=st.booleans(),
)


def drive(trace: RoutingTrace, num_slots: int, policy: str) -> ExpertCache:
    """A running cache on the tokens of a trace, asked as the runtime asks: a prompt at once, then token by token."""
    cache = ExpertCache(trace.num_experts.tolist(), [num_slots] * trace.num_layers, policy)
    token = 0
    while token < trace.num_tokens:
        same = (trace.sequence == trace.sequence[token]) & (trace.phase == trace.phase[token])
        prefill = trace.phase[token] == 0
        num = int(same.sum()) if prefill else 1
        if token == 0 or trace.sequence[token] != trace.sequence[token - 1]:
            cache.new_sequence()
        for layer_idx in range(trace.num_layers):
            experts = trace.experts[token : token + num, layer_idx]
            sums = {int(e): 0.0 for e in experts.reshape(-1) if e >= 0}
            probs = np.ones(experts.shape) if trace.probs is None else trace.probs[token : token + num, layer_idx]
            for e, p in zip(experts.reshape(-1).tolist(), probs.reshape(-1).tolist(), strict=True):
                if e >= 0:
                    sums[e] += p
            ids = list(sums) if num == 1 else sorted(sorted(sums), key=lambda e: -sums[e])
            lease = cache.acquire(
                layer_idx,
                ids,
                weights=[sums[e] for e in ids],
                admit=Admit.IF_HOTTER if prefill else Admit.ALWAYS,
                phase="prefill" if prefill else "decode",
            )
            for miss in lease.misses:
                cache.mark_loaded(layer_idx, miss.expert_idx)
            cache.release(lease)
        token += num
    return cache


def replay_in_python(trace: RoutingTrace, **options: Any) -> ReplayResult:
    """As where no library was built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "library", lambda: None)
        with pytest.warns(RuntimeWarning, match="was not built"):
            return replay(trace, **options)


@pytest.mark.parametrize("policy", policy_names())
@given(traces, st.integers(1, 8))
@example(  # without weights, how many tokens of a prompt ask for an expert decides how much it counts
    random_trace(2, num_tokens=16, num_layers=3, num_experts=6, top_k=3, prompt_tokens=2), 5
)
@settings(max_examples=60, deadline=None)
def test_counts_are_those_of_a_running_cache(policy: str, trace: RoutingTrace, num_slots: int):
    num_slots = min(num_slots, int(trace.num_experts[0]))
    if (trace.experts < 0).all():
        return
    expected = drive(trace, num_slots, policy).stats.snapshot()
    assert replay(trace, policy=policy, num_slots=num_slots).stats == expected


@given(traces, st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_every_policy_runs_alike_in_python(trace: RoutingTrace, num_slots: int):
    num_slots = min(num_slots, int(trace.num_experts[0]))
    if (trace.experts < 0).all():
        return
    for policy in (*policy_names(), "belady"):
        for counting in ("run", "token"):
            fast = replay(trace, policy=policy, num_slots=num_slots, counting=counting)
            slow = replay_in_python(trace, policy=policy, num_slots=num_slots, counting=counting)
            assert fast.stats == slow.stats
            np.testing.assert_array_equal(fast.fetched, slow.fetched)


@pytest.mark.parametrize("num_slots", [3, 5, 12])
def test_lru_hits_are_those_of_a_list(num_slots: int):
    trace = random_trace(3, num_tokens=300, prompt_tokens=5, num_sequences=3)
    layers = replay(trace, policy="lru", num_slots=num_slots, counting="token").stats.layers
    events = token_events(trace)
    assert [layer.total.hits for layer in layers] == [naive_lru_hits(events, idx, num_slots) for idx in range(2)]
    assert all(layer.prefill.requests and layer.decode.requests for layer in layers)


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(0, 3), st.integers(0, 4))
@example(seed=657, top_k=1, extra_slots=0, prompt_tokens=3)  # an event that asks for several decides between them later
@settings(max_examples=60, deadline=None)
def test_belady_is_the_best_of_all_choices(seed: int, top_k: int, extra_slots: int, prompt_tokens: int):
    trace = random_trace(
        seed,
        num_tokens=14,
        num_layers=1,
        num_experts=7,
        top_k=top_k,
        prompt_tokens=prompt_tokens,
        num_sequences=3 if prompt_tokens else 1,
    )
    num_slots = top_k + extra_slots
    events = events_of(trace)
    asked = [i for i in range(events.num_events) if events.kind[i] != EventKind.NEW_SEQUENCE]
    steps = [(0, events.expert_ids[events.begin[i] : events.begin[i + 1]].tolist()) for i in asked]
    prompts = [at for at, i in enumerate(asked) if events.kind[i] == EventKind.ACQUIRE_IF_HOTTER]
    assert belady(trace, num_slots=num_slots).stats.total.hits == most_hits(steps, num_slots, prompts)


@given(traces, st.integers(4, 8), st.sampled_from(["run", "token"]))
@settings(max_examples=60, deadline=None)
def test_no_policy_has_more_hits_than_belady(trace: RoutingTrace, num_slots: int, counting: str):
    num_slots = min(num_slots, int(trace.num_experts[0]))
    if (trace.experts < 0).all():
        return
    best = belady(trace, num_slots=num_slots, counting=counting).stats.total.hits
    for policy in replay_policies():
        assert replay(trace, policy=policy, num_slots=num_slots, counting=counting).stats.total.hits <= best


def test_each_layer_has_slots_of_its_own():
    trace = random_trace(5, num_layers=3)
    together = replay(trace, policy="decay", num_slots=[3, 6, 12])
    for layer_idx, num_slots in enumerate([3, 6, 12]):
        alone = replay(trace, policy="decay", num_slots=num_slots)
        assert together.stats.layers[layer_idx] == alone.stats.layers[layer_idx]
    assert together.total_slots == 21


def test_a_policy_may_be_given_as_a_class():
    class Favourites:
        """Keeps the lower numbers."""

        def __init__(self, num_experts):
            self._scores = [[-e for e in range(n)] for n in num_experts]

        def touch(self, layer_idx, expert_ids, weights):
            assert weights is None

        def scores(self, layer_idx):
            return self._scores[layer_idx]

        def new_sequence(self):
            pass

    experts = np.array([[[0]], [[1]], [[2]], [[0]], [[1]], [[2]]])
    result = replay(RoutingTrace(experts=experts), policy=Favourites, num_slots=2)
    assert result.policy == "Favourites"
    assert result.fetched[result.events.kind == EventKind.ACQUIRE].tolist() == [1, 1, 1, 0, 1, 1]


def test_an_expert_named_twice_counts_once():
    result = replay(RoutingTrace(experts=np.array([[[3, 3, 1]], [[1, 3, 1]]])), policy="lru", num_slots=2)
    assert (result.stats.decode.requests, result.stats.decode.hits) == (4, 2)


def recorded(*events: tuple[EventKind, list[int]]) -> RoutingTrace:
    experts = [e for _, ids in events for e in ids]
    return RoutingTrace(
        experts=np.zeros((1, 1, 1), np.int16),
        num_experts=np.array([6]),
        num_slots=np.array([2]),
        event_kind=np.array([kind for kind, _ in events], np.uint8),
        event_layer=np.zeros(len(events), np.int16),
        event_token=np.zeros(len(events), np.int32),
        event_size=np.array([len(ids) for _, ids in events], np.int32),
        event_experts=np.array(experts, np.int16),
        event_weights=np.ones(len(experts), np.float32),
    )


def test_what_the_run_recorded_goes_before_what_the_tokens_tell():
    trace = recorded(
        (EventKind.NEW_SEQUENCE, []),
        (EventKind.ACQUIRE_IF_HOTTER, [5, 4, 3]),
        (EventKind.RESIZE, [1]),
        (EventKind.ACQUIRE, [4]),
        (EventKind.ACQUIRE, [3]),
        (EventKind.ACQUIRE, []),
        (EventKind.ACQUIRE, [4, 0]),
    )
    stats = replay(trace, policy="lru").stats
    assert (stats.prefill.requests, stats.prefill.misses, stats.prefill.bypassed) == (3, 2, 1)
    assert (stats.decode.requests, stats.decode.hits, stats.decode.misses) == (4, 2, 2)


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([(EventKind.ACQUIRE, [2, 2])], "name an expert twice"),
        ([(EventKind.ACQUIRE, [6])], "experts that their layer does not have"),
        ([(EventKind.ACQUIRE, [-1])], "experts that their layer does not have"),
        ([(EventKind.RESIZE, [1])], "names no experts"),
    ],
)
def test_records_that_make_no_sense_are_refused(events: list, message: str):
    with pytest.raises(ConfigError, match=message):
        replay(recorded(*events), policy="lru")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "fifo", "num_slots": 3}, r"unknown policy 'fifo'; choose one of: lru, lfu, decay.*belady"),
        ({"num_slots": 0}, r"layer 0 cannot have 0 slots: .* at most 12"),
        ({"num_slots": [4, 13]}, r"layer 1 cannot have 13 slots: .* at most 12"),
        ({"num_slots": [4, 4, 4]}, "3 numbers of slots for 2 layers"),
        ({}, "does not tell how many slots"),
    ],
)
def test_what_no_cache_could_be_is_refused(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        replay(random_trace(1), **options)


@pytest.mark.parametrize("shape", [(0, 2, 3), (5, 2, 0), (5, 0, 3)])
def test_a_trace_of_nothing_is_refused(shape: tuple[int, ...]):
    with pytest.raises(ConfigError, match="nothing to replay"):
        replay(RoutingTrace(experts=np.zeros(shape, np.int16)), policy="lru", num_slots=1)


def test_bytes_are_those_of_what_was_not_resident():
    trace = random_trace(2, num_tokens=100, prompt_tokens=10, expert_bytes=np.array([1000, 10]))
    result = replay(trace, policy="lru", num_slots=4)
    for phase in ("decode", "prefill"):
        counts = [getattr(layer, phase) for layer in result.stats.layers]
        expected = tuple((c.misses + c.bypassed) * size for c, size in zip(counts, (1000, 10), strict=True))
        assert result.layer_bytes(phase) == expected
    assert (result.num_decode_tokens, result.num_prefill_tokens) == (90, 10)
    assert result.bytes_per_token == sum(result.layer_bytes()) / 90
    assert replay(random_trace(2), policy="lru", num_slots=4).layer_bytes() is None


def test_a_share_of_the_slots_holds_a_token_at_least():
    trace = random_trace(1, num_experts=12, top_k=3)
    assert share_of_slots(trace, 0.5) == (6, 6)
    assert share_of_slots(trace, 0.1) == (3, 3)
    assert share_of_slots(trace, 1) == (12, 12)


def test_weights_that_were_not_recorded_are_none():
    class Weighed:
        """Remembers what it is told."""

        told: ClassVar[list] = []

        def __init__(self, num_experts):
            self._scores = [[0.0] * n for n in num_experts]

        def touch(self, layer_idx, expert_ids, weights):
            self.told.append(weights)

        def scores(self, layer_idx):
            return self._scores[layer_idx]

        def new_sequence(self):
            pass

    trace = recorded((EventKind.ACQUIRE, [0, 1]), (EventKind.ACQUIRE, [2]))
    weights = np.array([0.3, 0.7, np.nan], np.float32)
    replay(dataclasses.replace(trace, event_weights=weights), policy=Weighed)
    assert Weighed.told == [weights[:2].astype(np.float16).tolist(), None]


def test_short_prompts_count_as_the_run_counted_them():
    trace = recorded((EventKind.ACQUIRE, [0, 1]), (EventKind.ACQUIRE_IF_HOTTER, [2]), (EventKind.ACQUIRE, [3]))
    trace = dataclasses.replace(
        trace,
        experts=np.zeros((7, 1, 1), np.int16),
        phase=np.array([0, 0, 0, 0, 0, 0, 1], np.uint8),
        event_token=np.array([0, 2, 6]),
        step=np.array([0, 0, 1, 1, 1, 1, 2]),
        **{name: np.zeros(3, np.int64) for name in ("step_begin_us", "step_us", "step_tokens")},
    )
    result = replay(trace, policy="lru")
    assert (result.num_decode_tokens, result.num_prefill_tokens) == (3, 4)
