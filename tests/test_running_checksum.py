"""The checksum of bytes that land in any order is that of the whole."""

import random
import threading

import pytest
import xxhash

from moe_offload.offload.streaming.running_checksum import RunningChecksum

SIZE_BYTES = 1_000_003


def chunks(size_bytes: int) -> list[range]:
    ends = [*range(size_bytes, SIZE_BYTES, size_bytes), SIZE_BYTES]
    return [range(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


@pytest.fixture(scope="module")
def data() -> bytes:
    return random.Random(0).randbytes(SIZE_BYTES)


@pytest.mark.parametrize("chunk_bytes", [1000, 300_000, SIZE_BYTES])
def test_in_any_order(data: bytes, chunk_bytes: int) -> None:
    for seed in range(3):
        order = chunks(chunk_bytes)
        random.Random(seed).shuffle(order)
        checksum = RunningChecksum()
        for chunk in order:
            checksum.landed(memoryview(data), chunk)
        assert checksum.hexdigest() == xxhash.xxh3_64_hexdigest(data)


@pytest.mark.parametrize("seed", range(5))
def test_from_several_threads(data: bytes, seed: int) -> None:
    order = chunks(4096)
    random.Random(seed).shuffle(order)
    checksum, left = RunningChecksum(), iter(order)
    lock = threading.Lock()

    def land() -> None:
        while True:
            with lock:
                chunk = next(left, None)
            if chunk is None:
                return
            checksum.landed(memoryview(data), chunk)

    threads = [threading.Thread(target=land) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert checksum.hexdigest() == xxhash.xxh3_64_hexdigest(data)


def test_nothing_counts_before_what_is_missing(data: bytes) -> None:
    checksum = RunningChecksum()
    first, *others = chunks(200_000)
    for chunk in others:
        checksum.landed(memoryview(data), chunk)
    assert checksum.hexdigest() == xxhash.xxh3_64_hexdigest(b"")
    checksum.landed(memoryview(data), first)
    assert checksum.hexdigest() == xxhash.xxh3_64_hexdigest(data)
