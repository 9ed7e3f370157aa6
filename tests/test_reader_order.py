import threading

import pytest
import tiny_packs

from moe_offload.errors import ConfigError, ExpertReadError
from moe_offload.offload.streaming import reader as reader_module
from moe_offload.offload.streaming.read_queue import cut
from moe_offload.offload.streaming.reader import ExpertReader, ReadCancelledError
from moe_offload.offload.streaming.slab import Slab

CHUNK_BYTES = 4096
SLOT_BYTES = 4 * CHUNK_BYTES
TIMEOUT_S = 30


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pack")
    return folder, tiny_packs.write_pack(folder, num_layers=1, num_experts=8, slot_bytes=SLOT_BYTES)


@pytest.fixture
def slab():
    with Slab(8, SLOT_BYTES) as slab:
        yield slab


class Gate:
    """Holds back every read of a disk until it is let through; `arrived` tells that one waits."""

    def __init__(self, disk):
        self._passes = threading.Semaphore(0)
        self._arrivals = threading.Semaphore(0)
        disk.before_read = self

    def __call__(self, name, offset_bytes, size_bytes):
        self._arrivals.release()
        assert self._passes.acquire(timeout=TIMEOUT_S)

    def arrived(self, count=1):
        for _ in range(count):
            assert self._arrivals.acquire(timeout=TIMEOUT_S)

    def let_through(self, count=1000):
        self._passes.release(count)


@pytest.fixture
def disk(faulty_disk_class):
    return faulty_disk_class()


@pytest.fixture
def gate(disk):
    gate = Gate(disk)
    yield gate
    gate.let_through()


def make_reader(pack, disk, num_threads=1, **options):
    return ExpertReader(pack[1], pack[0], disk=disk, num_threads=num_threads, chunk_bytes=CHUNK_BYTES, **options)


@pytest.fixture
def reader(pack, disk, gate):
    """One thread, so that the order of reads is the order of decisions."""
    with make_reader(pack, disk) as reader:
        yield reader
        gate.let_through()


def order(pack, disk):
    """The experts in the order in which their chunks were asked for."""
    starts = {expert.offset_bytes: i for i, expert in pack[1].layers[0].experts.items()}
    return [
        next(i for start, i in starts.items() if start <= offset_bytes < start + SLOT_BYTES)
        for _, offset_bytes, _ in disk.log
    ]


def submit(reader, slab, expert_idx, **options):
    return reader.submit(0, expert_idx, slab.memory(expert_idx), **options)


def test_demand_comes_before_speculation(pack, reader, slab, disk, gate):
    reads = [submit(reader, slab, 0, speculative=True), submit(reader, slab, 1, speculative=True)]
    gate.arrived()
    reads += [submit(reader, slab, 2), submit(reader, slab, 3)]
    gate.let_through()
    for read in reads:
        read.wait(TIMEOUT_S)
    assert order(pack, disk) == [0, 2, 2, 2, 2, 3, 3, 3, 3, 0, 0, 0, 1, 1, 1, 1]


def test_promotion(pack, reader, slab, disk, gate):
    first = submit(reader, slab, 0)
    gate.arrived()
    reads = [submit(reader, slab, e, speculative=True) for e in (1, 2, 3)]
    assert reads[2].promote()
    assert reads[2].promote()
    assert not reads[2].speculative
    assert not reads[2].cancel()
    gate.let_through()
    for read in [first, *reads]:
        read.wait(TIMEOUT_S)
    assert order(pack, disk)[::4] == [0, 3, 1, 2]


def test_cancel_between_chunks(pack, reader, slab, disk, gate):
    heard = []
    read = submit(reader, slab, 0, speculative=True, on_done=heard.append)
    gate.arrived()
    assert read.cancel()
    assert read.cancel()
    assert not read.done(), "a chunk is still being written into the slot"
    assert not heard
    assert not read.promote()
    gate.let_through()
    with pytest.raises(ReadCancelledError, match="expert 0 of layer 0"):
        read.wait(TIMEOUT_S)
    assert [type(error) for error in heard] == [ReadCancelledError]
    assert order(pack, disk) == [0]
    assert reader.stats.cancelled == 1


def test_cancel_before_the_first_chunk(pack, reader, slab, disk, gate):
    heard = []
    first = submit(reader, slab, 0)
    gate.arrived()
    read = submit(reader, slab, 1, speculative=True, on_done=lambda e: heard.append((e, threading.current_thread())))
    assert read.cancel()
    gate.let_through()
    with pytest.raises(ReadCancelledError):
        read.wait(TIMEOUT_S)
    first.wait(TIMEOUT_S)
    ((error, thread),) = heard
    assert isinstance(error, ReadCancelledError)
    assert thread is reader._threads[0]
    assert 1 not in order(pack, disk)


def test_a_demand_cannot_be_cancelled(reader, slab, gate):
    read = submit(reader, slab, 0)
    gate.arrived()
    assert not read.cancel()
    gate.let_through()
    read.wait(TIMEOUT_S)


def test_what_is_done_cannot_be_cancelled(reader, slab, gate):
    gate.let_through()
    read = submit(reader, slab, 0, speculative=True)
    read.wait(TIMEOUT_S)
    assert not read.cancel()
    assert read.promote()
    read.wait(TIMEOUT_S)


def test_one_expert_is_spread_over_the_threads(pack, slab, disk, gate):
    with make_reader(pack, disk, num_threads=4) as reader:
        read = submit(reader, slab, 0)
        gate.arrived(4)  # all of its chunks at once
        gate.let_through()
        read.wait(TIMEOUT_S)


def test_done_only_after_every_chunk(pack, slab, disk, gate):
    with make_reader(pack, disk, num_threads=4) as reader:
        read = submit(reader, slab, 0)
        gate.arrived(4)
        for _ in range(3):
            gate.let_through(1)
        with pytest.raises(TimeoutError, match="expert 0 of layer 0"):
            read.wait(0.05)
        assert not read.done()
        gate.let_through(1)
        read.wait(TIMEOUT_S)
        assert bytes(slab.memory(0)) == tiny_packs.expert_bytes(0, 0, SLOT_BYTES)


def test_the_callback_comes_before_waiters_wake(reader, slab, gate):
    seen = []
    released = threading.Event()

    def on_done(error):
        released.wait(TIMEOUT_S)
        seen.append((error, read.done(), threading.current_thread()))

    read = submit(reader, slab, 0, on_done=on_done)
    gate.let_through()
    released.set()
    read.wait(TIMEOUT_S)
    assert seen == [(None, False, reader._threads[0])]


@pytest.mark.parametrize(("verify", "times"), [("first", 2), ("always", 4), ("off", 0)])
def test_what_is_verified(pack, slab, disk, verify, times):
    with make_reader(pack, disk, verify=verify) as reader:
        for expert_idx in (0, 1, 0, 1):
            submit(reader, slab, expert_idx).wait(TIMEOUT_S)
        assert reader.stats.verified == times


def test_counting(pack, slab, disk):
    with make_reader(pack, disk) as reader:
        assert reader.stats == reader_module.ReaderStats()
        for expert_idx in range(3):
            submit(reader, slab, expert_idx).wait(TIMEOUT_S)
        stats = reader.stats
    assert (stats.reads, stats.bytes_read, stats.retries, stats.failed) == (3, 3 * SLOT_BYTES, 0, 0)
    assert stats.read_s > 0


def test_close_fails_what_is_outstanding(pack, slab, disk, gate):
    reader = make_reader(pack, disk)
    heard = []
    reads = [submit(reader, slab, e, speculative=e > 3, on_done=heard.append) for e in range(6)]
    gate.arrived()
    closing = threading.Thread(target=reader.close)
    closing.start()
    for read in reads[1:]:
        with pytest.raises(TimeoutError):
            read.wait(0)  # the only thread is still in its chunk
    gate.let_through()
    closing.join()
    for read in reads:
        with pytest.raises(ExpertReadError, match=r"is not there: the reader of .* was closed"):
            read.wait(TIMEOUT_S)
    assert len(heard) == 6
    assert not any(thread.is_alive() for thread in reader._threads)
    with pytest.raises(ExpertReadError, match="was closed"):
        submit(reader, slab, 0)
    reader.close()


def test_close_does_not_wait_for_a_dead_disk(pack, slab, disk, gate, monkeypatch):
    monkeypatch.setattr(reader_module, "CLOSE_TIMEOUT_S", 0.05)
    reader = make_reader(pack, disk)
    heard = []
    read = submit(reader, slab, 0, on_done=heard.append)
    gate.arrived()
    reader.close()
    with pytest.raises(ExpertReadError, match="was closed"):
        read.wait(TIMEOUT_S)
    gate.let_through()
    for thread in reader._threads:
        thread.join()
    assert len(heard) == 1


def test_close_from_a_callback(pack, slab, disk):
    reader = make_reader(pack, disk, num_threads=2)
    read = submit(reader, slab, 0, on_done=lambda error: reader.close())
    read.wait(TIMEOUT_S)
    for thread in reader._threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()


def test_submit_from_a_callback(pack, slab, disk):
    with make_reader(pack, disk) as reader:
        nested = []
        submit(reader, slab, 0, on_done=lambda error: nested.append(submit(reader, slab, 1))).wait(TIMEOUT_S)
        nested[0].wait(TIMEOUT_S)
    assert bytes(slab.memory(1)) == tiny_packs.expert_bytes(0, 1, SLOT_BYTES)


def test_wrong_arguments(pack, slab, reader, gate):
    with pytest.raises(IndexError, match="no expert 8 of layer 0"):
        reader.submit(0, 8, slab.memory(0))
    with pytest.raises(IndexError, match="no expert 0 of layer -1"):
        reader.submit(-1, 0, slab.memory(0))
    for into in (memoryview(bytes(SLOT_BYTES)), memoryview(bytearray(SLOT_BYTES - 1))):
        with pytest.raises(ValueError, match=f"needs {SLOT_BYTES} writable bytes"):
            reader.submit(0, 0, into)
    with pytest.raises(ConfigError, match="'sometimes'; it is one of first, always, off"):
        make_reader(pack, None, verify="sometimes")
    with pytest.raises(ConfigError, match="chunks of 1000 bytes"):
        ExpertReader(pack[1], pack[0], chunk_bytes=1000)


def test_memory_that_is_not_aligned(pack):
    """Read through the page cache, but read."""
    into = memoryview(bytearray(SLOT_BYTES + 1))[1:]
    with make_reader(pack, None) as reader:
        reader.submit(0, 3, into).wait(TIMEOUT_S)
    assert bytes(into) == tiny_packs.expert_bytes(0, 3, SLOT_BYTES)


def test_from_memory_instead_of_the_disk(pack, disk, gate, slab):
    source = bytearray(b"\x07") * SLOT_BYTES
    with make_reader(pack, disk, num_threads=2) as reader:
        read = submit(reader, slab, 3, source=memoryview(source))
        read.wait(TIMEOUT_S)
        assert bytes(slab.memory(3)) == bytes(source), "as it is there: it was verified when it was read"
        stats = reader.stats
        assert (stats.reads, stats.bytes_read, stats.verified) == (0, 0, 0)


@pytest.mark.parametrize(
    ("pages", "most_pages", "sizes"),
    [(1, 4, [1]), (4, 4, [4]), (5, 4, [3, 2]), (12, 5, [4, 4, 4]), (13, 4, [4, 4, 4, 1])],
)
def test_chunks_are_as_equal_as_pages_let_them_be(pages, most_pages, sizes):
    chunks = cut(pages * 4096, most_pages * 4096)
    assert [len(chunk) // 4096 for chunk in chunks] == sizes
    assert [at for chunk in chunks for at in chunk] == list(range(pages * 4096))
