"""Copies into VRAM slots: demand before prefetches, which go piece by piece; on a fake device."""

from typing import Any

import pytest
import torch
from fake_device import FakeDevice

from moe_offload.errors import ExpertCopyError, ExpertReadError
from moe_offload.offload.streaming.reader import ReadCancelledError
from moe_offload.offload.tiers import slot_copy
from moe_offload.offload.tiers.device_slot import DeviceSlot
from moe_offload.offload.tiers.host_expert import HostExpert
from moe_offload.offload.tiers.slot_copy import PIECES_AHEAD, CopySchedule, SlotCopy

PIECE, SIZE = 64, 64 * 5


class Copies:
    """A schedule on a fake device that does nothing by itself."""

    def __init__(self) -> None:
        self.device = FakeDevice()
        self.schedule = CopySchedule(self.device)
        self.begun: list[tuple[int, int]] = []  # the expert and the bytes of each copy that was enqueued
        copy = self.device.copy

        def noted(source: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            self.begun.append((int(source[0]), source.numel()))
            copy(source, *args, **kwargs)

        self.device.copy = noted  # type: ignore[method-assign]

    def new(self, number: int, *, speculative: bool) -> "OneCopy":
        return OneCopy(self, number, speculative)

    def finish(self) -> None:
        while self.device.step():
            pass


class OneCopy:
    """Of an expert full of its number."""

    def __init__(self, copies: Copies, number: int, speculative: bool) -> None:
        self.device, self.number = copies.device, number
        self.slot = DeviceSlot(copies.device, copies.device.allocate(SIZE).view(1, SIZE), 0)
        self.outcomes: list[BaseException | None] = []
        self.held_until: list[Any] = []
        self.copy = SlotCopy(
            copies.schedule, (0, number), self.slot, speculative=speculative, done=self.outcomes.append
        )
        self.data = torch.full((SIZE,), number, dtype=torch.uint8)
        self._start = lambda: copies.schedule.start(self.copy, HostExpert(self.data, self.held_until.append))

    def start(self) -> "OneCopy":
        self._start()
        return self

    def check_arrived(self) -> None:
        assert self.outcomes == [None]
        (event,) = self.held_until
        assert event.is_over()
        assert (self.slot.data == self.number).all()


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Copies:
    monkeypatch.setattr(slot_copy, "PIECE_BYTES", PIECE)
    return Copies()


def test_demand_overtakes_prefetches_but_for_the_pieces_under_way(copies: Copies):
    guesses = [copies.new(number, speculative=True).start() for number in (1, 2, 3)]
    assert copies.begun == [(1, PIECE)] * PIECES_AHEAD
    needed = copies.new(9, speculative=False).start()
    assert needed.outcomes == [None], "enqueued at once, and whole"
    assert copies.begun[PIECES_AHEAD:] == [(9, SIZE)]
    copies.finish()
    for one in (*guesses, needed):
        one.check_arrived()
    assert [number for number, _ in copies.begun if number != 9] == [1] * 5 + [2] * 5 + [3] * 5
    assert copies.device.link.totals().num_bytes == 4 * SIZE
    assert not copies.device.hazards


def test_never_more_pieces_than_a_demand_may_wait_for(copies: Copies):
    guess = copies.new(1, speculative=True).start()
    events: list[Any] = []
    record = copies.device._record
    copies.device._record = lambda event, stream: (record(event, stream), events.append(event))  # type: ignore
    while not guess.outcomes:
        assert sum(not event.mark.reached for event in events) <= PIECES_AHEAD
        assert copies.device.step()
    copies.finish()
    guess.check_arrived()


def test_what_is_needed_after_all_is_copied_to_its_end_at_once(copies: Copies):
    first, second = (copies.new(number, speculative=True).start() for number in (1, 2))
    assert second.copy.promote()
    assert second.outcomes == [None]
    assert copies.begun == [*[(1, PIECE)] * PIECES_AHEAD, (2, SIZE)]
    assert first.copy.promote()
    assert copies.begun[-1] == (1, SIZE - PIECES_AHEAD * PIECE)
    copies.finish()
    first.check_arrived()
    second.check_arrived()
    assert second.copy.promote()
    assert second.outcomes == [None]


def test_a_guess_is_given_up_between_two_pieces(copies: Copies):
    guess = copies.new(1, speculative=True).start()
    assert guess.copy.cancel()
    assert not guess.outcomes, "never from within cancel"
    copies.finish()
    assert isinstance(guess.outcomes[0], ReadCancelledError)
    assert len(copies.begun) == PIECES_AHEAD
    (event,) = guess.held_until
    assert event.mark is not None, "host memory is kept until the last piece is over"
    assert not copies.device.hazards


def test_a_guess_given_up_before_its_bytes_came_is_not_copied(copies: Copies):
    guess = copies.new(1, speculative=True)
    assert guess.copy.cancel()
    guess.start()
    assert isinstance(guess.outcomes[0], ReadCancelledError)
    assert not copies.begun
    (event,) = guess.held_until
    assert event.is_over()


def test_given_up_and_wanted_again(copies: Copies):
    guess = copies.new(1, speculative=True).start()
    assert guess.copy.cancel()
    assert guess.copy.promote()
    assert guess.outcomes == [None]
    assert not guess.copy.cancel(), "too late"
    copies.finish()
    guess.check_arrived()


def test_promoted_before_its_bytes_came(copies: Copies):
    guess = copies.new(1, speculative=True)
    guess.copy.promote()
    guess.start()
    assert copies.begun == [(1, SIZE)]
    copies.finish()
    guess.check_arrived()


@pytest.mark.parametrize("speculative", [False, True])
def test_a_copy_that_fails(copies: Copies, speculative: bool):
    copies.device.fail_copies = 1
    failed = copies.new(1, speculative=speculative).start()
    assert isinstance(failed.outcomes[0], ExpertCopyError)
    assert len(failed.held_until) == 1
    after = copies.new(2, speculative=speculative).start()
    copies.finish()
    after.check_arrived()


def test_stopping_fails_what_is_left(copies: Copies):
    guesses = [copies.new(number, speculative=True).start() for number in (1, 2)]
    copies.schedule.stop()
    late = copies.new(3, speculative=False).start()
    for one in (*guesses, late):
        assert isinstance(one.outcomes[0], ExpertReadError)
        assert len(one.held_until) == 1
    copies.device.close()
    assert not copies.device.hazards
