"""What the tier below VRAM does, one case at a time, on a fake device and disk."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_device import FakeDevice, FakePageLock
from fake_world import PAGE, World

from moe_offload.errors import ExpertCopyError, ExpertReadError
from moe_offload.offload.streaming.reader import ReadCancelledError
from moe_offload.offload.tiers.host_expert import HostExpert

MakeWorld = Callable[..., World]


@pytest.fixture
def make_world(monkeypatch: pytest.MonkeyPatch) -> MakeWorld:
    """One layer of six experts, unless told otherwise."""

    def make(**kwargs: Any) -> World:
        return World(monkeypatch, **{"num_experts": [6], "num_slots": [1], "num_host_slots": [0]} | kwargs)

    return make


class Outcome:
    """What a fetch came to."""

    def __init__(self, world: World, layer_idx: int, expert_idx: int, *, speculative: bool = False) -> None:
        self.expert: HostExpert | None = None
        self.error: BaseException | None = None
        self.fetch = world.tier.host.fetch(
            layer_idx, expert_idx, speculative=speculative, keep=True, landed=self._landed, failed=self._failed
        )

    def _landed(self, expert: HostExpert) -> None:
        assert self.expert is None
        assert self.error is None
        self.expert = expert

    def _failed(self, error: BaseException) -> None:
        assert self.expert is None
        assert self.error is None
        self.error = error

    def let_go(self, world: World) -> None:
        assert self.expert is not None
        self.expert.hold_until(world.device.new_event())


def test_what_was_read_once_is_copied_again_from_host_memory(make_world: MakeWorld):
    world = make_world(num_host_slots=[6])
    for _ in range(3):
        for expert_idx in range(6):
            world.run(0, [expert_idx])
            world.finish()
    assert world.tier.bytes_read == 6 * PAGE
    assert world.tier.bytes_copied == 18 * PAGE
    assert world.tier.host.resident(0) == list(range(6))
    world.check()


def test_a_layer_without_host_slots_is_read_every_time(make_world: MakeWorld):
    world = make_world(num_experts=[6, 6], num_slots=[1, 1], num_host_slots=[0, 6])
    for _ in range(2):
        for expert_idx in range(6):
            world.run(0, [expert_idx])
            world.run(1, [expert_idx])
    world.finish()
    assert [layer_idx for layer_idx, _, _ in world.reader.log].count(0) == 12
    assert [layer_idx for layer_idx, _, _ in world.reader.log].count(1) == 6
    assert world.tier.host.resident(0) == []
    world.check()


def test_a_prompt_leaves_host_memory_as_decode_made_it(make_world: MakeWorld):
    world = make_world(num_slots=[1], num_host_slots=[2])
    for expert_idx in (0, 1, 2):
        world.run(0, [expert_idx])
        world.finish()
    assert world.tier.host.resident(0) == [1, 2]
    world.run(0, [5, 4, 3, 2, 1, 0], prefill=True)
    world.finish()
    assert world.tier.host.resident(0) == [1, 2]
    world.check()


def test_a_failed_read_ends_the_step_and_not_the_tier(make_world: MakeWorld):
    world = make_world(num_host_slots=[2], failing=1.0)
    with pytest.raises(ExpertReadError, match="expert 3 of layer 0"):
        world.run(0, [3])
    world.reader.failing = 0.0
    assert world.run(0, [3]) == [3]
    world.finish()
    world.check()


def test_a_failed_copy_is_a_typed_error(make_world: MakeWorld):
    world = make_world(num_host_slots=[1])
    for _ in range(4):  # more often than there is host memory: it is given back each time
        world.device.fail_copies = 1
        with pytest.raises(ExpertCopyError, match=r"expert 3 of layer 0 could not be copied .*unspecified launch"):
            world.run(0, [3])
    for expert_idx in range(6):
        assert world.run(0, [expert_idx]) == [expert_idx]
    world.finish()
    world.check()


def test_two_who_want_the_same_expert_share_a_read(make_world: MakeWorld):
    world = make_world(num_host_slots=[1])
    first, second = Outcome(world, 0, 2, speculative=True), Outcome(world, 0, 2, speculative=True)
    assert not first.fetch.cancel(), "the other one waits for it too"
    third = Outcome(world, 0, 2)
    assert not world.reader.reads[0].speculative, "somebody needs it now"
    world.reader.finish()
    assert len(world.reader.log) == 1
    for outcome in (first, second, third):
        outcome.let_go(world)
    assert bytes(world.blobs[0, 2]) == first.expert.data.numpy().tobytes()
    world.check()


def test_a_cancelled_read_is_not_waited_for(make_world: MakeWorld):
    world = make_world(num_host_slots=[1])
    guess = Outcome(world, 0, 2, speculative=True)
    assert guess.fetch.cancel()
    needed = Outcome(world, 0, 2)
    assert not guess.fetch.promote()
    world.reader.finish()
    assert isinstance(guess.error, ReadCancelledError)
    assert needed.error is None
    needed.let_go(world)
    assert Outcome(world, 0, 2).error is None
    world.check()


def test_demand_goes_before_speculation_where_staging_is_short(make_world: MakeWorld):
    world = make_world(num_host_staging_slots=1)
    first = Outcome(world, 0, 0)
    guess = Outcome(world, 0, 1, speculative=True)
    needed = Outcome(world, 0, 2)
    world.reader.finish()
    first.let_go(world)
    world.reader.finish()
    assert needed.expert is not None
    assert guess.expert is None
    needed.let_go(world)
    world.reader.finish()
    guess.let_go(world)
    world.check()


def test_speculation_leaves_staging_to_demand(make_world: MakeWorld):
    world = make_world(num_host_staging_slots=3)
    guesses = [Outcome(world, 0, expert_idx, speculative=True) for expert_idx in range(3)]
    assert len(world.reader.reads) == 1
    Outcome(world, 0, 3)
    assert len(world.reader.reads) == 2
    assert guesses[1].fetch.promote()
    assert len(world.reader.reads) == 3, "promoted, it may use the slots kept for demand"
    world.reader.finish()
    world.check()


def test_a_guess_that_waits_for_staging_can_be_given_up(make_world: MakeWorld):
    world = make_world(num_host_staging_slots=1)
    first = Outcome(world, 0, 0)
    guess = Outcome(world, 0, 1, speculative=True)
    kept = Outcome(world, 0, 2, speculative=True)
    assert guess.fetch.cancel()
    assert guess.error is None, "never from within cancel"
    assert kept.fetch.cancel()
    assert kept.fetch.promote(), "wanted after all"
    world.reader.finish()
    first.let_go(world)
    assert isinstance(guess.error, ReadCancelledError)
    assert not guess.fetch.promote()
    world.reader.finish()
    kept.let_go(world)
    assert [expert_idx for _, expert_idx, _ in world.reader.log] == [0, 2]
    assert not first.fetch.cancel()
    world.check()


def test_staging_is_not_written_before_its_copy_is_over(make_world: MakeWorld):
    world = make_world(num_host_staging_slots=1)
    first = Outcome(world, 0, 0)
    world.reader.finish()
    event = world.device.new_event()
    world.device.copy(first.expert.data, torch.zeros(PAGE, dtype=torch.uint8), after=(), event=event)
    first.expert.hold_until(event)
    second = Outcome(world, 0, 1)
    world.finish()
    assert second.expert is not None
    assert event.is_over()
    assert not world.device.hazards


def test_closing_fails_those_that_wait(make_world: MakeWorld):
    world = make_world(num_host_slots=[2], num_host_staging_slots=1)
    outcomes = [Outcome(world, 0, expert_idx) for expert_idx in range(5)]
    world.tier.close()
    assert all(isinstance(outcome.error, ExpertReadError) for outcome in outcomes)
    world.tier.close()


def test_without_page_locking_everything_still_works(make_world: MakeWorld):
    with pytest.warns(UserWarning, match=r"20\.0 KiB of 20\.0 KiB .* hold up the thread.*ulimit -l"):
        world = make_world(num_host_slots=[3], page_lock=FakePageLock(limit_bytes=0))
    assert world.run(0, [0]) == [0]
    world.finish()
    assert not world.reader.from_memory, "staging is no better"
    world.check()
    world.residency.close()


def test_staging_is_page_locked_before_the_cache(make_world: MakeWorld):
    page_lock = FakePageLock(limit_bytes=2 * PAGE)
    with pytest.warns(UserWarning, match=r"12\.0 KiB of 20\.0 KiB .* by way of staging"):
        world = make_world(num_host_slots=[3], page_lock=page_lock)
    assert world.tier.host.pageable_bytes == 3 * PAGE
    assert list(page_lock.locked.values()) == [2 * PAGE]
    world.residency.close()
    assert not page_lock.locked


def test_what_is_not_page_locked_goes_through_staging(make_world: MakeWorld):
    """Read once, into its host slot; and each time copied on by way of memory that the device can fetch from."""
    with pytest.warns(UserWarning, match="by way of staging"):
        world = make_world(num_host_slots=[6], page_lock=FakePageLock(limit_bytes=2 * PAGE))
    sources: list[int] = []
    copy = world.device.copy

    def noted(source: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        sources.append(source.data_ptr())
        copy(source, *args, **kwargs)

    world.device.copy = noted  # type: ignore[method-assign]
    for _ in range(2):
        for expert_idx in range(6):
            world.run(0, [expert_idx])
            world.finish()
    ((address, size_bytes),) = world.device.page_lock.locked.items()
    assert sources
    assert all(address <= source < address + size_bytes for source in sources)
    assert len(world.reader.log) == 6
    assert len(world.reader.from_memory) == 12
    assert world.tier.bytes_read == 6 * PAGE
    world.check()


def test_closing_lets_go_of_what_waits_for_staging_with_its_bytes_in_memory(make_world: MakeWorld):
    with pytest.warns(UserWarning, match="by way of staging"):
        world = make_world(num_host_slots=[6], num_host_staging_slots=1, page_lock=FakePageLock(limit_bytes=PAGE))
    for expert_idx in range(3):
        world.run(0, [expert_idx])
        world.finish()
    outcomes = [Outcome(world, 0, expert_idx) for expert_idx in range(3)]
    world.tier.close()
    assert all(isinstance(outcome.error, ExpertReadError) for outcome in outcomes)
    world.tier.host.check_integrity()
    assert not world.tier.host._slots._cache._leases


def test_a_guess_that_waits_for_staging_with_its_bytes_in_memory_can_be_given_up(make_world: MakeWorld):
    with pytest.warns(UserWarning, match="by way of staging"):
        world = make_world(num_host_slots=[6], num_host_staging_slots=1, page_lock=FakePageLock(limit_bytes=PAGE))
    for expert_idx in range(2):
        world.run(0, [expert_idx])
        world.finish()
    first, guess = Outcome(world, 0, 0), Outcome(world, 0, 1, speculative=True)
    assert guess.fetch.cancel()
    world.reader.finish()
    first.let_go(world)
    world.reader.finish()
    assert isinstance(guess.error, ReadCancelledError)
    assert not world.tier.host._slots._cache._leases
    world.check()


def test_a_layers_slots_are_one_piece_of_memory(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch):
    sizes: list[int] = []
    allocate = FakeDevice.allocate

    def counted(device: FakeDevice, size_bytes: int) -> torch.Tensor:
        sizes.append(size_bytes)
        return allocate(device, size_bytes)

    monkeypatch.setattr(FakeDevice, "allocate", counted)
    world = make_world(num_experts=[6] * 3, num_slots=[1, 2, 3], num_host_slots=[0] * 3, num_pages=[1, 2, 1])
    assert sizes == [2 * 2 * PAGE, PAGE, 2 * 2 * PAGE, 3 * PAGE], "staging, then layer by layer"
    assert world.tier.slab(1).shape == (2, 2 * PAGE)
    slot = world.tier._slot(1, 1)
    assert slot.data.data_ptr() == world.tier.slab(1)[world.tier.row(1, 1)].data_ptr()


def test_a_stream_waits_once_for_an_arrival(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch):
    world = make_world(num_slots=[2])
    waits: list[str] = []
    wait = world.device.wait
    monkeypatch.setattr(world.device, "wait", lambda event: (waits.append(world.device.current), wait(event)))
    for stream in ("compute", "compute", "another", "compute", "another"):
        world.device.current = stream
        world.run(0, [0])
    assert waits == ["compute", "another"]
    world.run(0, [1])
    assert len(waits) == 3
