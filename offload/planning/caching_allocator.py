"""What torch's caching allocator takes of a CUDA device for the tensors that are asked of it.

The rules of torch 2.13 (``c10/core/AllocatorConfig.h``, ``c10/cuda/CUDACachingAllocator.cpp``) with its default
settings: sizes are rounded to 512 bytes; those up to 1 MiB lie in segments of 2 MiB, those up to 10 MiB in segments of
20 MiB, larger ones in segments of their own, a multiple of 2 MiB. A segment is what ``cudaMalloc`` gives. A free block
is split where more than 1 MiB is left over, among small ones where 512 bytes are; the smallest that fits is taken, of
equal ones that at the lowest address.
"""

import bisect
from collections.abc import Iterable
from dataclasses import dataclass

_MIB = 1024**2
BLOCK_BYTES = 512
LARGEST_SMALL_BYTES = _MIB
SMALL_SEGMENT_BYTES = 2 * _MIB
LEAST_OWN_SEGMENT_BYTES = 10 * _MIB
SHARED_SEGMENT_BYTES = 20 * _MIB
SEGMENT_MULTIPLE_BYTES = 2 * _MIB


def rounded_bytes(size_bytes: int) -> int:
    """A tensor's block."""
    return max(BLOCK_BYTES, _round_up(size_bytes, BLOCK_BYTES))


def segment_bytes(size_bytes: int) -> int:
    """The segment that is made for a block that fits in no free one."""
    if size_bytes <= LARGEST_SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if size_bytes < LEAST_OWN_SEGMENT_BYTES:
        return SHARED_SEGMENT_BYTES
    return _round_up(size_bytes, SEGMENT_MULTIPLE_BYTES)


def small_bytes(sizes: Iterable[int]) -> int:
    """The bytes of those tensors that are small."""
    return sum(size_bytes for size_bytes in sizes if size_bytes <= LARGEST_SMALL_BYTES)


@dataclass(eq=False)
class Block:
    """A part of a segment; ``before`` and ``after`` are its neighbours there."""

    is_small: bool
    size_bytes: int
    address: int
    before: "Block | None" = None
    after: "Block | None" = None
    is_free: bool = True


class CachingAllocator:
    """One stream's segments; no memory, only its accounts."""

    def __init__(self, limit_bytes: int | None = None) -> None:
        """``limit_bytes``: of all segments; MemoryError where giving back those of which nothing is used won't do."""
        self._limit_bytes = limit_bytes
        self.reserved_bytes = 0
        self.allocated_bytes = 0
        self._next_address = 0  # each segment above the last one
        self._free: dict[bool, list[Block]] = {True: [], False: []}  # by size

    def allocate(self, size_bytes: int) -> Block:
        """A block for a tensor of so many bytes."""
        size_bytes = rounded_bytes(size_bytes)
        is_small = size_bytes <= LARGEST_SMALL_BYTES
        free = self._free[is_small]
        place = bisect.bisect_left(free, (size_bytes, 0), key=_order)
        block = free.pop(place) if place < len(free) else self._segment(segment_bytes(size_bytes), is_small)
        left_bytes = block.size_bytes - size_bytes
        if left_bytes >= BLOCK_BYTES if is_small else left_bytes > LARGEST_SMALL_BYTES:
            rest = Block(is_small, left_bytes, block.address + size_bytes, before=block, after=block.after)
            if rest.after is not None:
                rest.after.before = rest
            block.size_bytes, block.after = size_bytes, rest
            self._keep(rest)
        block.is_free = False
        self.allocated_bytes += block.size_bytes
        return block

    def free(self, block: Block) -> None:
        """The tensor is gone; its block grows together with free neighbours."""
        self.allocated_bytes -= block.size_bytes
        block.is_free = True
        for other in (block.before, block.after):
            if other is not None and other.is_free:
                self._free[other.is_small].remove(other)
                block.size_bytes += other.size_bytes
                if other is block.before:
                    block.address, block.before = other.address, other.before
                    if other.before is not None:
                        other.before.after = block
                else:
                    block.after = other.after
                    if other.after is not None:
                        other.after.before = block
        self._keep(block)

    def _segment(self, size_bytes: int, is_small: bool) -> Block:
        if self._limit_bytes is not None and self.reserved_bytes + size_bytes > self._limit_bytes:
            self._release()
            if self.reserved_bytes + size_bytes > self._limit_bytes:
                raise MemoryError(f"{size_bytes} bytes beside {self.reserved_bytes} are more than {self._limit_bytes}")
        self.reserved_bytes += size_bytes
        address, self._next_address = self._next_address, self._next_address + size_bytes
        return Block(is_small, size_bytes, address)

    def _release(self) -> None:
        """Give back the segments of which nothing is used, as torch does before it says that memory is out."""
        for is_small, free in self._free.items():
            whole = [block for block in free if block.before is None and block.after is None]
            self.reserved_bytes -= sum(block.size_bytes for block in whole)
            self._free[is_small] = [block for block in free if block not in whole]

    def _keep(self, block: Block) -> None:
        bisect.insort(self._free[block.is_small], block, key=_order)


def _order(block: Block) -> tuple[int, int]:
    return block.size_bytes, block.address


def _round_up(size_bytes: int, multiple: int) -> int:
    return -(-size_bytes // multiple) * multiple
