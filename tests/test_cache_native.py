"""The compiled policies against those written in Python, which are the truth: the same scores to the last bit."""

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload.cache import Policy, kernels, make_policy, policy_names
from moe_offload.cache.native_policy import NativePolicy
from moe_offload.errors import ConfigError

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="the library was not built")
IN_BOTH = [name for name in policy_names() if name in kernels.policy_names()]


def random_events(seed: int, num_events: int) -> list[tuple[int, list[int]] | None]:
    """(layer, experts), or None where another text begins."""
    rng = random.Random(seed)
    return [
        None if rng.random() < 0.01 else (rng.randrange(2), rng.sample(range(9), rng.randint(1, 5)))
        for _ in range(num_events)
    ]


def feed(policy: Policy, event: tuple[int, Sequence[int]] | None) -> None:
    if event is None:
        policy.new_sequence()
    else:
        policy.touch(*event, None)


def test_the_library_has_the_policies_that_python_has():
    assert set(IN_BOTH) >= {"lru", "lfu", "decay"}


@pytest.mark.parametrize("name", IN_BOTH)
def test_scores_are_those_of_the_python_policy(name: str):
    native, reference = NativePolicy(name, [9, 9]), make_policy(name, [9, 9])
    for event in random_events(seed=1, num_events=12_000):
        feed(native, event)
        feed(reference, event)
        for layer_idx in range(2):
            assert list(native.scores(layer_idx)) == list(reference.scores(layer_idx))


@pytest.mark.parametrize("name", IN_BOTH)
def test_layers_are_of_their_own_sizes(name: str):
    policy = NativePolicy(name, [3, 5])
    policy.touch(1, [4, 2], [0.75, 0.25])
    assert list(policy.scores(0)) == [0, 0, 0]
    assert [score > 0 for score in policy.scores(1)] == [False, False, True, False, True]


def test_an_event_without_experts_is_none():
    for name in IN_BOTH:
        policy = NativePolicy(name, [3])
        policy.touch(0, [1], None)
        before = list(policy.scores(0))
        policy.touch(0, [], None)
        policy.touch(0, [], [])
        assert list(policy.scores(0)) == before


def test_a_policy_that_the_library_lacks_is_refused():
    with pytest.raises(ConfigError, match="'fifo' needs the compiled library of the cache, which has: lru, lfu, decay"):
        NativePolicy("fifo", [4])


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20))
@settings(max_examples=300)
def test_weights_are_rounded_as_traces_hold_them(weights: list[float]):
    values = np.array(weights, np.float64)
    library = kernels.library()
    assert library is not None
    library.moe_cache_round_to_half(values.ctypes.data, len(values))
    with np.errstate(over="ignore"):
        expected = np.array(weights, np.float32).astype(np.float16).astype(np.float64)
    in_range = np.isfinite(expected)
    np.testing.assert_array_equal(values[in_range], expected[in_range])
