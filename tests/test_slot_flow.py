"""Chunks on their way from the disk through page-locked memory into VRAM: what flows, and what counts."""

from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_device import RUBBISH, FakeDevice, FakePageLock
from fake_reader import FakeRead
from fake_world import PAGE, World, make_manifest

from moe_offload.errors import ExpertCopyError, ExpertReadError
from moe_offload.offload.streaming.reader import ReadWatcher
from moe_offload.offload.tiers.cuda_tier import CudaTier
from moe_offload.offload.tiers.slot_copy import _gaps

MakeWorld = Callable[..., World]


@pytest.fixture
def make_world(monkeypatch: pytest.MonkeyPatch) -> MakeWorld:
    def make(**kwargs: Any) -> World:
        return World(monkeypatch, **{"num_experts": [4], "num_slots": [2], "num_host_slots": [0]} | kwargs)

    return make


class Wanted:
    """An expert that was asked of the tier."""

    def __init__(self, world: World, expert_idx: int, slot: int = 0, *, speculative: bool = False) -> None:
        self.world, self.expert_idx = world, expert_idx
        self.ends: list[BaseException | None] = []
        self.transfer = world.tier.begin(0, expert_idx, slot, speculative=speculative, done=self.ends.append)
        self.place = world.tier._slot(0, slot)

    @property
    def read(self) -> FakeRead:
        (read,) = [read for read in self.world.reader.reads if read.key == (0, self.expert_idx)]
        return read

    def is_right(self) -> bool:
        return bytes(self.place.data.numpy().tobytes()) == self.world.blobs[0, self.expert_idx]


def copies(world: World) -> int:
    return world.device.num_copies


@pytest.mark.parametrize("num_host_slots", [0, 4])
def test_chunks_are_enqueued_as_they_land_and_count_at_the_end(make_world: MakeWorld, num_host_slots: int):
    world = make_world(num_host_slots=[num_host_slots])
    wanted = Wanted(world, 1)
    for landed in (1, 2):
        world.reader.step()
        assert copies(world) == landed
        assert not wanted.ends, "not verified yet"
    world.reader.step()
    assert copies(world) == 2, "nothing was left to copy"
    assert wanted.ends == [None]
    world.finish()
    assert wanted.is_right()
    assert world.device.link.totals().demand_bytes == PAGE
    world.check()


def test_guesses_do_not_flow_and_what_is_promoted_does(make_world: MakeWorld):
    world = make_world()
    wanted = Wanted(world, 1, speculative=True)
    world.reader.step()
    assert not copies(world)
    assert wanted.transfer.promote()
    world.reader.step()
    assert copies(world) == 1
    world.reader.step()
    assert copies(world) == 2, "what had landed before it was promoted"
    assert wanted.ends == [None]
    world.finish()
    assert wanted.is_right()
    world.check()


def test_a_read_that_fails_midway_empties_the_slot(make_world: MakeWorld):
    world = make_world(num_host_slots=[2], failing=1.0)
    with pytest.raises(ExpertReadError, match="expert 3 of layer 0"):
        world.run(0, [3])
    assert copies(world) == 2, "its bytes had flowed"
    assert not list(world.cache.resident(0))
    world.reader.failing = 0.0
    assert world.run(0, [3]) == [3]
    world.finish()
    world.check()


def test_host_memory_of_a_failed_read_is_kept_until_what_flowed_is_over(make_world: MakeWorld):
    world = make_world(num_host_staging_slots=1, failing=1.0)
    failed = Wanted(world, 1)
    world.reader.finish()
    assert isinstance(failed.ends[0], ExpertReadError)
    world.reader.failing = 0.0
    following = Wanted(world, 2, 1)
    world.finish()
    assert following.ends == [None]
    assert following.is_right()
    world.check()


def test_damaged_bytes_flow_once_more(make_world: MakeWorld):
    world = make_world(damaged=1.0)
    wanted = Wanted(world, 1)
    world.reader.step()
    world.reader.step()
    assert copies(world) == 2
    assert not wanted.ends
    while world.device.step():
        pass
    assert (wanted.place.data == RUBBISH).all(), "which nobody was told to use"
    world.reader.finish()
    assert copies(world) == 4
    assert wanted.ends == [None]
    world.finish()
    assert wanted.is_right()
    world.check()


def test_a_copy_that_fails_midway_is_a_typed_error(make_world: MakeWorld):
    world = make_world()
    wanted = Wanted(world, 1)
    world.device.fail_copies = 1
    world.reader.finish()
    (error,) = wanted.ends
    assert isinstance(error, ExpertCopyError)
    assert not copies(world), "nothing more is copied of it"
    again = Wanted(world, 1)
    world.finish()
    assert again.is_right()
    world.check()


def test_closing_midway(make_world: MakeWorld):
    world = make_world()
    wanted = Wanted(world, 1)
    world.reader.step()
    watcher = wanted.read.watcher
    assert watcher is not None
    world.tier.close()
    assert isinstance(wanted.ends[0], ExpertReadError)
    num_copies = copies(world)
    watcher.chunk_landed(range(PAGE // 2))  # by a thread that the disk had kept for too long
    assert copies(world) == num_copies
    assert not world.hazards


def test_memory_that_is_not_page_locked_would_hold_up_the_reader(make_world: MakeWorld):
    with pytest.warns(UserWarning, match="not page-locked"):
        world = make_world(page_lock=FakePageLock(limit_bytes=0))
    wanted = Wanted(world, 1)
    assert wanted.read.watcher is None
    world.finish()
    assert copies(world) == 1
    assert wanted.is_right()


@pytest.mark.parametrize(
    ("spans", "gaps"),
    [
        ([], [range(10)]),
        ([range(10)], []),
        ([range(6, 10), range(2)], [range(2, 6)]),
        ([range(2, 4), range(4, 6)], [range(2), range(6, 10)]),
    ],
)
def test_what_is_left_to_copy(spans: list[range], gaps: list[range]):
    assert list(_gaps(spans, 10)) == gaps


# -- what it is for: a machine whose disk and link have rates, and a clock that only they move --


class Clock:
    now_s = 0.0


class TimedEvent:
    def __init__(self, clock: Clock, device: object) -> None:
        self.clock, self.device, self.over_s = clock, device, 0.0

    def is_over(self) -> bool:
        return self.over_s <= self.clock.now_s

    def wait(self) -> None:
        self.clock.now_s = max(self.clock.now_s, self.over_s)


class TimedLink(FakeDevice):
    """Copies that take as long as their bytes do, one after the other."""

    def __init__(self, clock: Clock, bytes_per_s: float) -> None:
        super().__init__()
        self.clock, self.bytes_per_s, self.free_s = clock, bytes_per_s, 0.0

    def new_event(self) -> Any:
        return TimedEvent(self.clock, self)

    def copy(self, source: Any, target: Any, *, after: Iterable[Any], event: Any, is_ahead: bool = False) -> None:
        target.copy_(source)
        self.free_s = max(self.free_s, self.clock.now_s) + source.numel() / self.bytes_per_s
        event.over_s = self.free_s

    def close(self) -> None:
        self.closed = True


class TimedDisk:
    """Reads one expert after the other, chunk by chunk; at the end its bytes are verified."""

    def __init__(self, clock: Clock, bytes_per_s: float, chunk_bytes: int, verify_bytes_per_s: float) -> None:
        self.clock, self.bytes_per_s, self.chunk_bytes = clock, bytes_per_s, chunk_bytes
        self.verify_bytes_per_s = verify_bytes_per_s
        self.reads: list[FakeRead] = []

    def submit(self, layer_idx: int, expert_idx: int, into: memoryview, **settings: Any) -> FakeRead:
        data = torch.frombuffer(into, dtype=torch.uint8)
        read = FakeRead((layer_idx, expert_idx), data, settings["speculative"], settings["on_done"])
        self.reads.append(read)
        return read

    def run(self, *, flows: bool) -> None:
        for read in self.reads:
            size = read.into.numel()
            for begin, end in pairwise([*range(0, size, self.chunk_bytes), size]):
                self.clock.now_s += (end - begin) / self.bytes_per_s
                read.into[begin:end] = 1 + read.key[1]
                watcher: ReadWatcher | None = read.watcher
                if flows and watcher is not None:
                    watcher.chunk_landed(range(begin, end))
            self.clock.now_s += size / self.verify_bytes_per_s
            read.on_done(None)

    def close(self) -> None:
        pass


NUM_CHUNKS, CHUNK = 16, PAGE
DISK, VERIFY = 3.5e9, 1e10


def usable_after_s(link_bytes_per_s: float, *, flows: bool, experts: int = 1) -> float:
    clock = Clock()
    disk, link = TimedDisk(clock, DISK, CHUNK, VERIFY), TimedLink(clock, link_bytes_per_s)
    tier = CudaTier(
        make_manifest([4], [NUM_CHUNKS]),
        disk,  # type: ignore[arg-type]
        [link],
        num_slots=[4],
        num_staging_slots=1,
        num_host_slots=[0],
        num_host_staging_slots=4,
    )
    ends: list[BaseException | None] = []
    for expert_idx in range(experts):
        tier.begin(0, expert_idx, expert_idx, speculative=False, done=ends.append)
    disk.run(flows=flows)
    assert ends == [None] * experts
    for expert_idx in range(experts):
        place = tier._slot(0, expert_idx)
        assert (place.data == 1 + expert_idx).all()
        place._arrival.wait()
    tier.close()
    return clock.now_s


SIZE = NUM_CHUNKS * CHUNK


@pytest.mark.parametrize("link_bytes_per_s", [25e9, 6e9, 3.5e9, 1.5e9])
def test_disk_and_link_take_as_long_as_the_slower_of_them(link_bytes_per_s: float):
    disk_s, link_s, verify_s = SIZE / DISK, SIZE / link_bytes_per_s, SIZE / VERIFY
    one_after_the_other = usable_after_s(link_bytes_per_s, flows=False)
    assert one_after_the_other == pytest.approx(disk_s + verify_s + link_s)
    piped = usable_after_s(link_bytes_per_s, flows=True)
    behind_s = max(disk_s + CHUNK / link_bytes_per_s, CHUNK / DISK + link_s)
    assert piped == pytest.approx(max(disk_s + verify_s, behind_s))
    assert piped <= max(disk_s + verify_s, link_s) * (1 + 1 / NUM_CHUNKS)


def test_several_at_a_time():
    """Read one after the other: the link was busy with the last but one anyway; the last gains the same."""
    piped, one_by_one = (usable_after_s(6e9, flows=flows, experts=3) for flows in (True, False))
    assert one_by_one - piped == pytest.approx(SIZE / 6e9)


def test_the_example_of_the_documentation():
    """docs/tiers.md: an expert of Mixtral in nf4 from an NVMe, over a fast and a slow link; in milliseconds."""
    text = (Path(__file__).parent.parent / "docs" / "tiers.md").read_text()
    size = 4.25 / 8 * 3 * 4096 * 14336
    for link in (25e9, 6e9):
        disk_ms, link_ms, chunk_ms = (n * 1e3 for n in (size / 3.5e9, size / link, (4 << 20) / link))
        apart, piped = disk_ms + link_ms, max(disk_ms, link_ms) + chunk_ms
        assert f"{disk_ms:.1f} + {link_ms:.1f} = {apart:.1f} ms" in text
        assert f"{piped:.1f} ms" in text


# -- memory that is to be freed --


@pytest.mark.parametrize("fails", [False, True])
def test_a_slab_is_kept_until_copies_into_it_are_over(make_world: MakeWorld, fails: bool):
    """Also what nobody has used, and what did not come whole: it would be written to memory of others."""
    world = make_world(failing=float(fails))
    wanted = Wanted(world, 1)
    world.reader.finish()
    assert (wanted.ends == [None]) is not fails
    assert world.device._accesses, "under way"
    world.tier.resize(0, 1, {})
    assert not world.device._accesses
    world.check()
