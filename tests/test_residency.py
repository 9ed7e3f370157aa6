"""What passes between a step, a prefetch and a tier, on a tier that does what a test says."""

import threading
from concurrent.futures import ThreadPoolExecutor

from loaded_models import wait_for

from moe_offload.cache import ExpertCache
from moe_offload.offload.experts.residency import Residency
from moe_offload.offload.tiers.compute_tier import Done


class SlowToBegin:
    """A tier and its only transfer, whose beginning takes until `begun` is set."""

    num_staging_slots = 1

    def __init__(self) -> None:
        self.begun, self.promoted = threading.Event(), threading.Event()

    def begin(self, layer_idx: int, expert_idx: int, slot: int, *, speculative: bool, done: Done) -> "SlowToBegin":
        assert speculative
        self.done = done
        assert self.begun.wait(30)
        return self

    def promote(self) -> bool:
        self.promoted.set()
        return True

    def exchanges(self, layer_idx: int) -> bool:
        return False

    def use(self, layer_idx: int, slot: int) -> None: ...
    def used(self, layer_idx: int, slot: int) -> None: ...
    def close(self) -> None: ...


def test_a_prefetch_that_is_wanted_while_it_is_begun_is_promoted() -> None:
    tier = SlowToBegin()
    residency = Residency(ExpertCache([4], [2]), tier)  # type: ignore[arg-type]
    computed: list[int] = []
    with ThreadPoolExecutor(2) as pool:
        prefetching = pool.submit(residency.prefetch, 0, [3])
        wait_for(lambda: (0, 3) in residency._loads)
        step = pool.submit(residency.run, 0, [3], lambda expert_idx, weights: computed.append(expert_idx))
        wait_for(lambda: bool(residency._loads[0, 3].waiting))
        tier.begun.set()
        prefetching.result(timeout=30)
        was_promoted = tier.promoted.is_set()
        tier.done(None)
        step.result(timeout=30)
    assert was_promoted
    assert computed == [3]
    residency.cache.check_integrity()
    residency.close()


class AtOnce:
    """A tier whose transfers are done when they have begun, one staging slot."""

    num_staging_slots = 1

    def begin(self, layer_idx: int, expert_idx: int, slot: int, *, speculative: bool, done: Done) -> "AtOnce":
        done(None)
        return self

    def exchanges(self, layer_idx: int) -> bool:
        return True

    def use(self, layer_idx: int, slot: int) -> None: ...
    def used(self, layer_idx: int, slot: int) -> None: ...
    def close(self) -> None: ...


def test_what_others_wait_for_the_staging_slot_of_is_computed_before_hits() -> None:
    """Else the disk has nothing to do while a prompt's hits are computed."""
    residency = Residency(ExpertCache([5], [2]), AtOnce())  # type: ignore[arg-type]
    computed: list[int] = []

    def compute(expert_idx: int, weights: object) -> None:
        computed.append(expert_idx)

    for _ in range(3):
        residency.run(0, [0, 1], compute)
    computed.clear()
    residency.run(0, [0, 1, 2, 3, 4], compute, weights=[1.0] * 5, prefill=True)
    assert computed == [2, 3, 0, 1, 4]
    residency.cache.check_integrity()
    residency.close()
