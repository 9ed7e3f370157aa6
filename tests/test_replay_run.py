"""The replay of a real run counts exactly what the run's cache counted."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from loaded_models import loaded, make_pack

from moe_offload.cache import EventKind, RoutingTrace, StatsSnapshot, policy_names, read_trace
from moe_offload.cache.replay import belady, replay
from moe_offload.cache.replay_events import left_out

LONG_PROMPT = " ".join(f"w{(7 * i) % 120 + 5}" for i in range(24))
SHORT_PROMPT = "w7 w8 w90"


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("replayed"), "mixtral")


def recorded(pack: Path, path: Path, policy: str, num_slots: Sequence[int]) -> tuple[RoutingTrace, StatsSnapshot, int]:
    """A run from loading to closing: its trace, its cache's counts, the bytes that it read."""
    with loaded(pack, list(num_slots), prefetch=0, policy=policy, trace=path) as model:
        for prompt in (LONG_PROMPT, SHORT_PROMPT, LONG_PROMPT[::-1].replace("w", " w"), SHORT_PROMPT):
            model.generate(prompt, max_new_tokens=8)
        cache, bytes_read = model._residency.cache, model._residency.bytes_read
        return read_closed(model, path), cache.stats.snapshot(), bytes_read


def read_closed(model, path: Path) -> RoutingTrace:
    model.close()
    return read_trace(path)


@pytest.mark.parametrize("policy", policy_names())
def test_the_counts_are_those_of_the_run(pack: Path, tmp_path: Path, policy: str):
    trace, counted, bytes_read = recorded(pack, tmp_path / "run.npz", policy, [4, 2, 6])
    assert {EventKind.ACQUIRE, EventKind.ACQUIRE_IF_HOTTER} <= set(trace.event_kind.tolist())
    assert left_out(trace) == ()
    result = replay(trace, policy=policy)
    assert result.stats == counted
    assert result.stats.prefill.bypassed > 0
    assert result.stats.decode.evictions > 0
    assert sum(result.layer_bytes("decode")) + sum(result.layer_bytes("prefill")) == bytes_read
    assert belady(trace).stats.total.hits >= counted.total.hits


@pytest.mark.parametrize("policy", policy_names())
def test_a_replay_foretells_another_run(pack: Path, tmp_path: Path, policy: str):
    """What routers choose does not depend on the cache, so one trace tells of all."""
    trace, _, _ = recorded(pack, tmp_path / "lru.npz", "lru", [8, 8, 8])
    _, counted, _ = recorded(pack, tmp_path / "other.npz", policy, [3, 5, 2])
    assert replay(trace, policy=policy, num_slots=[3, 5, 2]).stats == counted
