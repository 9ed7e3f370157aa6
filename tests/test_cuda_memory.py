"""What a plan counts of a GPU's memory beside what it puts there, against the rules of torch's allocator."""

import random
import weakref
from collections.abc import Sequence
from typing import Any

import families
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import AutoModelForCausalLM, DynamicCache

from moe_offload.offload.planning.caching_allocator import Block, CachingAllocator, rounded_bytes, segment_bytes
from moe_offload.offload.planning.cuda_memory import fragmentation_bytes, graph_pool_bytes

KIB, MIB = 1024, 1024**2


@pytest.mark.parametrize(
    ("size_bytes", "block", "segment"),
    [
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (11 * MIB + 1, 11 * MIB + 512, 12 * MIB),
        (GIB := 1024**3, GIB, GIB),
    ],
)
def test_sizes_are_rounded_as_torch_does(size_bytes: int, block: int, segment: int):
    assert rounded_bytes(size_bytes) == block
    assert segment_bytes(block) == segment


def reserved_by(sizes: Sequence[int]) -> int:
    allocator = CachingAllocator()
    for size_bytes in sizes:
        allocator.allocate(size_bytes)
    return allocator.reserved_bytes


def test_small_tensors_share_segments():
    assert reserved_by([512 * KIB] * 4) == 2 * MIB
    assert reserved_by([512 * KIB] * 5) == 4 * MIB
    assert reserved_by([5 * MIB] * 4) == 20 * MIB
    assert reserved_by([6 * MIB] * 4) == 40 * MIB, "a fourth has no room beside three"
    assert reserved_by([6 * MIB] * 3 + [2 * MIB]) == 20 * MIB


def test_a_free_block_is_split_and_grows_together_again():
    allocator = CachingAllocator()
    large = allocator.allocate(30 * MIB)
    allocator.free(large)
    parts = [allocator.allocate(9 * MIB) for _ in range(3)]
    assert allocator.reserved_bytes == 30 * MIB
    for part in (parts[0], parts[2], parts[1]):
        allocator.free(part)
    allocator.allocate(30 * MIB)
    assert allocator.reserved_bytes == 30 * MIB
    assert allocator.allocated_bytes == 30 * MIB


def test_what_is_whole_is_given_back_before_memory_is_out():
    allocator = CachingAllocator(limit_bytes=40 * MIB)
    allocator.free(allocator.allocate(30 * MIB))
    kept = allocator.allocate(2 * MIB)
    rest = allocator.allocate(25 * MIB)
    assert allocator.reserved_bytes == 30 * MIB, "both lie in what was freed"
    allocator.free(rest)
    with pytest.raises(MemoryError):
        allocator.allocate(29 * MIB)
    allocator.free(kept)
    allocator.allocate(38 * MIB)
    assert allocator.reserved_bytes == 38 * MIB


def test_accounts_add_up_whatever_comes_and_goes():
    draw = random.Random(0)
    for _ in range(20):
        allocator, blocks = CachingAllocator(), []
        for _ in range(200):
            if blocks and draw.random() < 0.45:
                allocator.free(blocks.pop(draw.randrange(len(blocks))))
            else:
                blocks.append(allocator.allocate(int(2 ** draw.uniform(0, 26))))
            assert allocator.allocated_bytes == sum(block.size_bytes for block in blocks)
            free_bytes = sum(block.size_bytes for free in allocator._free.values() for block in free)
            assert allocator.reserved_bytes == allocator.allocated_bytes + free_bytes
        for block in blocks:
            allocator.free(block)
        assert allocator.allocated_bytes == 0
        assert all(block.before is block.after is None for free in allocator._free.values() for block in free)


def test_a_slab_a_layer_loses_less_than_two_mebibytes():
    slabs = [97 * MIB + 4096 * layer_idx for layer_idx in range(48)]
    none = {"dense_bytes": 0, "small_dense_bytes": 0, "cache_layers": (), "workspace_bytes": 0}
    lost_bytes = fragmentation_bytes(slabs, **none) - fragmentation_bytes([], **none)
    assert 0 < lost_bytes < 48 * 2 * MIB
    assert fragmentation_bytes([sum(slabs)], **none) - fragmentation_bytes([], **none) < 2 * MIB


def test_a_recorded_steps_pool_holds_more_than_its_workspace():
    assert graph_pool_bytes(5 * MIB, 3 * MIB) == (5 + 3 + 32 + 22) * MIB


# -- what comes and goes in a pass --


class Allocations(TorchDispatchMode):
    """Notes every storage that operators make, and its end."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []  # key, and bytes; 0 when it is gone
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._known |= {storage._cdata for storage in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage._cdata not in self._known and storage.nbytes():
                self._known.add(storage._cdata)
                self.events.append((storage._cdata, storage.nbytes()))
                weakref.finalize(storage, self._gone, storage._cdata)
        return out

    def _gone(self, key: int) -> None:
        self._known.discard(key)
        self.events.append((key, 0))


def _storages(tree: Any) -> list[Any]:
    return [leaf.untyped_storage() for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def replayed(events: Sequence[tuple[int, int]], limit_bytes: int | None = None) -> tuple[int, int]:
    """The peaks of what was allocated and reserved."""
    allocator, blocks, peaks = CachingAllocator(limit_bytes), dict[int, Block](), (0, 0)
    for key, size_bytes in events:
        if size_bytes:
            blocks[key] = allocator.allocate(size_bytes)
        elif key in blocks:
            allocator.free(blocks.pop(key))
        peaks = max(peaks[0], allocator.allocated_bytes), max(peaks[1], allocator.reserved_bytes)
    return peaks


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_what_a_pass_splits_is_within_the_share_that_is_planned(family: str):
    """Prompts and steps of a model of some width: with a quarter more than is alive, and open segments, they pass."""
    shape = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 16}
    config = families.make_config(family, **shape, num_key_value_heads=4, head_dim=64, vocab_size=4096)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    allocations, cache = Allocations(), DynamicCache(config=config)
    with torch.inference_mode(), allocations:
        for num_tokens in [384, 384, 1, 1]:
            model(input_ids=torch.ones(1, num_tokens, dtype=torch.long), past_key_values=cache, logits_to_keep=1)
    alive_bytes, reserved_bytes = replayed(allocations.events)
    nothing = {"dense_bytes": 0, "small_dense_bytes": 0, "cache_layers": ()}
    limit_bytes = alive_bytes + fragmentation_bytes([], workspace_bytes=alive_bytes, **nothing)
    assert alive_bytes > 10 * MIB, "small ones would lie in open segments"
    assert replayed(allocations.events, limit_bytes)[0] == alive_bytes
    assert reserved_bytes > alive_bytes
