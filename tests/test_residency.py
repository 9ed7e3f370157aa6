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
