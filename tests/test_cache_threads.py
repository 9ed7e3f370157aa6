"""Steps, prefetches and resizes from several threads at once."""

import random
import sys
import threading
from collections.abc import Iterator

import pytest

from moe_offload.cache import Admit, ExpertCache, policy_names

NUM_EXPERTS, NUM_THREADS, NUM_STEPS = 12, 4, 400


@pytest.fixture
def eager_switching() -> Iterator[None]:
    """Threads take turns every few bytecodes instead of every 5 ms."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("eager_switching")
@pytest.mark.parametrize("policy", policy_names())
def test_held_slots_keep_their_experts(policy: str):
    cache = ExpertCache([NUM_EXPERTS] * 2, [4, 7], policy, floors=[3, 3])
    content: dict[tuple[int, int], int] = {}  # written by whoever was given the slot to fill, read by whoever holds it
    problems: list[BaseException] = []

    def steps(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(NUM_STEPS):
            layer_idx = rng.randrange(2)
            ids = rng.sample(range(NUM_EXPERTS), 3)
            chance = rng.random()
            if chance < 0.1:
                cache.resize(layer_idx, rng.randrange(3, 9))
            elif chance < 0.3:
                for placement in cache.admit_prefetch(layer_idx, ids):
                    if rng.random() < 0.3 and cache.drop_prefetch(layer_idx, placement.expert_idx):
                        continue
                    content[layer_idx, placement.slot] = placement.expert_idx
                    assert cache.mark_loaded(layer_idx, placement.expert_idx)
            else:
                lease = cache.acquire(layer_idx, ids, admit=rng.choice(list(Admit)))
                for miss in lease.misses:
                    content[layer_idx, miss.slot] = miss.expert_idx
                    assert cache.mark_loaded(layer_idx, miss.expert_idx)
                for placement in lease.hits + lease.misses:
                    if not placement.loading or placement in lease.misses:
                        assert content[layer_idx, placement.slot] == placement.expert_idx
                if rng.random() < 0.5:
                    cache.release(lease)

    def run(seed: int) -> None:
        try:
            steps(seed)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        cache.check_integrity()
        cache.stats.snapshot()
    for thread in threads:
        thread.join()
    assert problems == []
    cache.check_integrity()
    for layer_idx in range(2):
        resident = cache.resident(layer_idx)
        assert {slot: content[layer_idx, slot] for slot in resident.values()} == {s: e for e, s in resident.items()}
        lease = cache.acquire(layer_idx, list(range(cache.num_slots(layer_idx))))
        assert lease.bypassed == []
