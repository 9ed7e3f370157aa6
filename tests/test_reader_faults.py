import errno
import mmap
import random
import threading

import pytest
import tiny_packs

from moe_offload.errors import ExpertReadError, PackCorruptError
from moe_offload.offload.streaming import reader as reader_module
from moe_offload.offload.streaming.reader import ExpertReader
from moe_offload.offload.streaming.slab import Slab

SLOT_BYTES = 16 * 4096
FILE = "experts-00001.safetensors"
TIMEOUT_S = 30


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pack")
    return folder, tiny_packs.write_pack(folder, num_layers=2, num_experts=6, slot_bytes=SLOT_BYTES)


@pytest.fixture
def slab():
    with Slab(6, SLOT_BYTES) as slab:
        yield slab


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(reader_module, "BACKOFF_S", (0.0, 0.0))


@pytest.fixture
def disk(faulty_disk_class):
    return faulty_disk_class(seed=1)


@pytest.fixture
def reader(pack, disk):
    folder, manifest = pack
    with ExpertReader(manifest, folder, disk=disk, num_threads=3, chunk_bytes=4096) as reader:
        yield reader


def expected(layer_idx, expert_idx):
    return tiny_packs.expert_bytes(layer_idx, expert_idx, SLOT_BYTES)


def read(reader, slab, expert_idx=2, layer_idx=1):
    """Read one expert and check its bytes, and that the callback heard once what the waiter hears."""
    heard = []
    outcome = reader.submit(layer_idx, expert_idx, slab.memory(0), on_done=heard.append)
    assert outcome.settled.wait(TIMEOUT_S)
    assert heard == [outcome.error]
    outcome.wait()
    assert bytes(slab.memory(0)) == expected(layer_idx, expert_idx)


def all_alive(reader):
    return [thread.is_alive() for thread in reader._threads] == [True] * 3


def test_short_reads(reader, slab, disk):
    disk.shorten_reads(0.9)
    for expert_idx in range(6):
        read(reader, slab, expert_idx)
    assert reader.stats.retries == 0


def test_an_error_once(reader, slab, disk):
    disk.fail_reads(FILE, times=1)
    read(reader, slab)
    assert reader.stats.retries == 1


def test_errors_twice_at_one_place(reader, slab, disk, pack):
    spec = pack[1].layers[1].experts[2]
    disk.fail_reads(FILE, offset_bytes=spec.offset_bytes + 5000, size_bytes=1, times=2)
    read(reader, slab)
    assert reader.stats.retries == 2


def test_an_error_for_good(reader, slab, disk, pack):
    spec = pack[1].layers[1].experts[2]
    disk.fail_reads(FILE, offset_bytes=spec.offset_bytes, size_bytes=1)
    with pytest.raises(ExpertReadError, match=rf"expert 2 of layer 1 .*{FILE} at byte {spec.offset_bytes}.*: Input"):
        read(reader, slab)
    read(reader, slab, expert_idx=3)
    read(reader, slab, layer_idx=0)
    disk.heal()
    read(reader, slab)
    assert reader.stats.failed == 1
    assert all_alive(reader)


def test_a_byte_flipped_once(reader, slab, disk, pack):
    disk.flip_byte(FILE, pack[1].layers[1].experts[2].offset_bytes + 777, times=1)
    read(reader, slab)
    assert reader.stats.retries == 1
    assert reader.stats.verified == 1


@pytest.mark.parametrize("place", [0, 777, SLOT_BYTES - 1])
def test_a_byte_flipped_for_good(reader, slab, disk, pack, place):
    disk.flip_byte(FILE, pack[1].layers[1].experts[2].offset_bytes + place)
    with pytest.raises(PackCorruptError, match=f"expert 2 of layer 1 in .*{FILE}.* is damaged: its checksum is"):
        read(reader, slab)
    read(reader, slab, expert_idx=1)
    assert all_alive(reader)


def test_a_damaged_expert_is_damaged_each_time(reader, slab, disk, pack):
    disk.flip_byte(FILE, pack[1].layers[1].experts[2].offset_bytes)
    for _ in range(3):
        with pytest.raises(PackCorruptError):
            read(reader, slab)


class Watcher:
    """Notes what a read tells of its chunks, and copies them at once."""

    def __init__(self, memory, fails_at=None):
        self.memory, self.fails_at = memory, fails_at
        self.copied = bytearray(SLOT_BYTES)
        self.chunks, self.times_again = [], 0
        self.lock = threading.Lock()

    def chunk_landed(self, chunk):
        with self.lock:
            self.chunks.append(chunk)
            if len(self.chunks) == self.fails_at:
                raise ValueError("cannot take it")
            self.copied[chunk.start : chunk.stop] = self.memory[chunk.start : chunk.stop]

    def begins_again(self):
        self.times_again += 1
        self.chunks.clear()
        self.copied[:] = bytes(SLOT_BYTES)


def watched(reader, slab, **kwargs):
    """What a watcher knew of a read when that was done, and its error."""
    watcher = Watcher(slab.memory(0), **kwargs)
    told, is_watched, read_chunk = [], threading.Event(), reader._read_chunk

    def read_watched(*args):
        assert is_watched.wait(TIMEOUT_S)
        return read_chunk(*args)

    reader._read_chunk = read_watched
    read = reader.submit(
        1, 2, slab.memory(0), on_done=lambda error: told.append((list(watcher.chunks), bytes(watcher.copied), error))
    )
    read.watcher = watcher
    is_watched.set()
    assert read.settled.wait(TIMEOUT_S)
    assert read.watcher is None
    ((chunks, copied, error),) = told
    assert chunks == watcher.chunks, "nothing is told of a read that is done"
    return watcher, sorted(chunk.start for chunk in chunks), copied, error


def test_whoever_watches_hears_of_every_chunk_before_the_end(reader, slab, disk):
    disk.delay_reads(0.002)
    _, starts, copied, error = watched(reader, slab)
    assert error is None
    assert starts == list(range(0, SLOT_BYTES, 4096))
    assert copied == expected(1, 2)


def test_what_was_damaged_lands_again(reader, slab, disk, pack):
    disk.delay_reads(0.002)
    disk.flip_byte(FILE, pack[1].layers[1].experts[2].offset_bytes + 9000, times=1)
    watcher, starts, copied, error = watched(reader, slab)
    assert error is None
    assert watcher.times_again == 1
    assert starts == list(range(0, SLOT_BYTES, 4096))
    assert copied == expected(1, 2)


def test_a_watcher_hears_of_no_chunk_that_was_not_read(reader, slab, disk, pack):
    disk.delay_reads(0.002)
    disk.fail_reads(FILE, offset_bytes=pack[1].layers[1].experts[2].offset_bytes + 5 * 4096, size_bytes=1)
    _, starts, _, error = watched(reader, slab)
    assert isinstance(error, ExpertReadError)
    assert 5 * 4096 not in starts


def test_a_watcher_that_raises(reader, slab, disk):
    disk.delay_reads(0.002)
    *_, error = watched(reader, slab, fails_at=4)
    assert isinstance(error, ExpertReadError)
    assert "cannot take it" in str(error)
    assert all_alive(reader)
    read(reader, slab)


def test_a_truncated_shard(reader, slab, disk, pack):
    spec = pack[1].layers[1].experts[2]
    disk.truncate(FILE, spec.offset_bytes + 5000)
    with pytest.raises(PackCorruptError, match=f"{FILE} ends before expert 2 of layer 1"):
        read(reader, slab)
    read(reader, slab, expert_idx=1)


def test_a_missing_shard(reader, slab, disk):
    disk.remove(FILE)
    with pytest.raises(PackCorruptError, match=f"{FILE} with expert 2 of layer 1 is missing"):
        read(reader, slab)
    read(reader, slab, layer_idx=0)
    disk.heal()
    read(reader, slab)


def test_no_more_open_files(reader, slab, disk):
    disk.fail_reads(FILE, number=errno.EMFILE)
    with pytest.raises(ExpertReadError, match="Too many open files; raise the limit on open files"):
        read(reader, slab)


@pytest.mark.parametrize("failure", [MemoryError(), SystemExit(1), KeyboardInterrupt(), ZeroDivisionError("bug")])
def test_whatever_is_raised_no_thread_dies(reader, slab, disk, failure):
    def before_read(name, offset_bytes, size_bytes):
        raise failure

    disk.before_read = before_read
    for _ in range(5):
        with pytest.raises(ExpertReadError, match=type(failure).__name__):
            read(reader, slab)
    disk.before_read = None
    read(reader, slab)
    assert all_alive(reader)


def test_a_callback_that_raises(reader, slab, caplog):
    def on_done(error):
        raise ValueError("a bug in the caller")

    reader.submit(1, 2, slab.memory(0), on_done=on_done).wait(TIMEOUT_S)
    assert "callback of expert 2 of layer 1 failed" in caplog.text
    read(reader, slab)
    assert all_alive(reader)


def test_every_waiter_gets_an_error_of_its_own(reader, slab, disk):
    disk.remove(FILE)
    outcome = reader.submit(1, 2, slab.memory(0))
    caught = []
    for _ in range(2):
        with pytest.raises(PackCorruptError) as info:
            outcome.wait(TIMEOUT_S)
        caught.append(info.value)
    assert caught[0] is not caught[1]


def test_an_error_does_not_hold_the_slot(pack, disk):
    memory = mmap.mmap(-1, SLOT_BYTES)
    disk.fail_reads(FILE)
    with ExpertReader(pack[1], pack[0], disk=disk, num_threads=2, chunk_bytes=4096) as reader:
        outcome = reader.submit(1, 2, memoryview(memory))
        with pytest.raises(ExpertReadError):
            outcome.wait(TIMEOUT_S)
    memory.close()  # raises BufferError while a view of it is alive


def test_delays_and_reordering_change_no_byte(pack, disk):
    folder, manifest = pack
    disk.delay_reads(0.002)
    disk.shorten_reads(0.3)
    with (
        Slab(12, SLOT_BYTES) as slab,
        ExpertReader(manifest, folder, disk=disk, num_threads=4, chunk_bytes=8192, verify="off") as reader,
    ):
        reads = [reader.submit(slot % 2, slot // 2, slab.memory(slot), speculative=slot % 3 == 0) for slot in range(12)]
        for slot, outcome in enumerate(reads):
            outcome.wait(TIMEOUT_S)
            assert bytes(slab.memory(slot)) == expected(slot % 2, slot // 2)


def test_a_storm_of_faults(pack, disk):
    """Several threads read, cancel and promote while the disk does everything wrong; every read ends, and rightly."""
    folder, manifest = pack
    disk.delay_reads(0.0005)
    disk.shorten_reads(0.2)
    disk.fail_reads(FILE, times=60)
    for expert_idx in range(6):
        disk.flip_byte("experts-00000.safetensors", manifest.layers[0].experts[expert_idx].offset_bytes, times=3)
    wrong = []
    heard = []

    def use(seed, slab, reader):
        choose = random.Random(seed)
        for _ in range(40):
            layer_idx, expert_idx = choose.randrange(2), choose.randrange(6)
            outcome = reader.submit(
                layer_idx, expert_idx, slab.memory(0), speculative=choose.random() < 0.5, on_done=heard.append
            )
            if choose.random() < 0.3:
                outcome.cancel()
            if choose.random() < 0.3:
                outcome.promote()
            try:
                outcome.wait(TIMEOUT_S)
            except (ExpertReadError, PackCorruptError, reader_module.ReadCancelledError):
                continue
            if bytes(slab.memory(0)) != expected(layer_idx, expert_idx):
                wrong.append((layer_idx, expert_idx))

    with ExpertReader(manifest, folder, disk=disk, num_threads=4, chunk_bytes=4096, verify="always") as reader:
        slabs = [Slab(1, SLOT_BYTES) for _ in range(4)]
        threads = [threading.Thread(target=use, args=(seed, slab, reader)) for seed, slab in enumerate(slabs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = reader.stats
    assert not wrong
    assert len(heard) == 160
    assert stats.reads == heard.count(None) > 0
    assert stats.reads + stats.failed + stats.cancelled == 160
