"""Prefetches in staging slots: taken by steps, given up, made room of; on a tier that does what a test says."""

from collections.abc import Sequence

import pytest

from moe_offload.cache import ExpertCache
from moe_offload.offload.experts.residency import Residency
from moe_offload.offload.streaming.reader import ReadCancelledError
from moe_offload.offload.tiers.compute_tier import Done


class FakeTransfer:
    """One read, which ends when the test or a cancellation says so."""

    def __init__(self, tier: "FakeTier", memory: list[int], expert_idx: int, speculative: bool, done: Done) -> None:
        self.tier, self.memory, self.expert_idx = tier, memory, expert_idx
        self.speculative, self.done = speculative, done

    def finish(self) -> None:
        self.memory[0] = self.expert_idx
        self.tier.open.remove(self)
        self.done(None)

    def cancel(self) -> bool:
        if self.speculative:
            self.tier.open.remove(self)
            self.done(ReadCancelledError("given up"))
        return self.speculative

    def promote(self) -> bool:
        self.speculative = False
        return True


class FakeTier:
    """A memory is a list with the expert in it. Reads on demand end at once, guesses when the test lets them."""

    def __init__(self, num_slots: int, num_staging_slots: int) -> None:
        self.slots = [[-1] for _ in range(num_slots)]
        self.staging = [[-1] for _ in range(num_staging_slots)]
        self.num_staging_slots = num_staging_slots
        self.open: list[FakeTransfer] = []
        self.log: list[tuple[int, bool]] = []
        self.bytes_read = self.bytes_copied = self.bytes_cancelled = 0

    def memory(self, slot: int) -> list[int]:
        return self.slots[slot] if slot >= 0 else self.staging[-1 - slot]

    def begin(self, layer_idx: int, expert_idx: int, slot: int, *, speculative: bool, done: Done) -> FakeTransfer:
        self.log.append((expert_idx, speculative))
        transfer = FakeTransfer(self, self.memory(slot), expert_idx, speculative, done)
        self.open.append(transfer)
        if not speculative:
            transfer.finish()
        return transfer

    def exchanges(self, layer_idx: int) -> bool:
        return True

    def exchange(self, layer_idx: int, slot: int, staging_slot: int) -> None:
        at = -1 - staging_slot
        self.slots[slot], self.staging[at] = self.staging[at], self.slots[slot]

    def expert_bytes(self, layer_idx: int) -> int:
        return 4096

    def use(self, layer_idx: int, slot: int) -> int:
        return self.memory(slot)[0]

    def used(self, layer_idx: int, slot: int) -> None: ...
    def close(self) -> None: ...


class World:
    """A residency of one layer above a `FakeTier`; `step` checks that each expert is computed from its own bytes."""

    def __init__(self, num_slots: int = 2, num_staging_slots: int = 2) -> None:
        self.tier = FakeTier(num_slots, num_staging_slots)
        self.residency = Residency(ExpertCache([8], [num_slots]), self.tier)  # type: ignore[arg-type]

    def step(self, expert_ids: Sequence[int], *, prefill: bool = False) -> None:
        computed: list[tuple[int, object]] = []
        self.residency.run(0, expert_ids, lambda e, found: computed.append((e, found)), prefill=prefill)
        assert sorted(computed) == [(e, e) for e in sorted(expert_ids)]
        self.check()

    def check(self) -> None:
        residency = self.residency
        residency.cache.check_integrity()
        assert residency._free_staging.qsize() + len(residency.guesses) == self.tier.num_staging_slots


@pytest.fixture
def world() -> World:
    world = World()
    world.step([0, 1])  # no slot is empty any more
    world.tier.log.clear()
    return world


def test_a_right_guess_is_swapped_in(world: World) -> None:
    world.residency.prefetch(0, [5, 0])
    assert world.tier.log == [(5, True)]
    world.tier.open[0].finish()
    world.step([5, 0])
    assert world.tier.log == [(5, True)]
    assert world.residency.guesses.counts.used == 1
    world.step([5])  # it has the slot for good
    assert world.tier.log == [(5, True)]


def test_a_guess_on_its_way_is_promoted_and_lands_in_the_slot(world: World) -> None:
    world.residency.prefetch(0, [5])
    (transfer,) = world.tier.open

    def promote() -> bool:
        transfer.finish()
        return True

    transfer.promote = promote  # type: ignore[method-assign]
    world.step([5, 0])
    assert world.residency.guesses.counts.late == 1


def test_a_guess_cancelled_as_a_step_takes_it_is_read_again(world: World) -> None:
    world.residency.prefetch(0, [5])
    (transfer,) = world.tier.open

    def promote() -> bool:  # too late: the reader has just given it up
        world.tier.open.remove(transfer)
        transfer.done(ReadCancelledError("given up"))
        return False

    transfer.promote = promote  # type: ignore[method-assign]
    world.step([5, 0])
    assert world.tier.log == [(5, True), (5, False)]


def test_a_guess_is_computed_from_staging_where_there_is_no_slot(world: World) -> None:
    world.step([0, 1])
    world.residency.prefetch(0, [5])
    world.tier.open[0].finish()
    world.step([5, 0, 1], prefill=True)
    assert world.tier.log == [(5, True)]
    assert world.residency.cache.resident(0).keys() == {0, 1}


def test_steps_take_staging_back(world: World) -> None:
    world.residency.prefetch(0, [4, 5, 6])
    assert len(world.residency.guesses) == 2
    world.tier.open[0].finish()
    world.step([0, 1, 2, 3, 7])  # three of them through staging
    assert world.residency.guesses.counts.wasted > 0


def test_what_is_given_up_makes_room_for_what_is_wanted(world: World) -> None:
    world.residency.prefetch(0, [4, 5, 6, 7])
    world.tier.open[0].finish()
    assert world.tier.log == [(4, True), (5, True)]
    world.residency.cancel_prefetches(0, [6, 7])
    # 5 was on its way and is cut off; 4 has come, and goes since its slot is needed.
    assert world.tier.log[2:] == [(6, True), (7, True)]
    assert world.residency.guesses.counts.wasted == 2
    world.check()
