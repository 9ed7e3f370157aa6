"""Steps and prompts whose experts lie in two slabs and come in any order."""

import random
from collections.abc import Iterator

import pytest
import torch
from slot_slabs import SlotSlab, assert_near, random_slab

from moe_offload.offload.experts.slot_experts import ABSENT, SlotExperts, SlotRows, SlotStep
from moe_offload.offload.experts.weights import ExpertWeights, PartLayout
from moe_offload.quant.slot_kernels.plain import PlainKernels

NUM_EXPERTS = 6
PLACES = {0: 3, 1: 0, 2: 2, 4: 1}  # expert -> row of the cache's slab; 3 and 5 are in staging
STAGED = {3: 1, 5: 0}
NO_PARTS = PartLayout([])


class World:
    """Experts in a slab of the cache and one of staging, whose slots are larger."""

    def __init__(self) -> None:
        self.cached, other = random_slab("nf4", num_slots=4), random_slab("nf4", num_slots=2, seed=1)
        padded = torch.nn.functional.pad(other.data, (0, 4096))
        self.staged = SlotSlab(other.mlp, padded)
        self.experts = SlotExperts(self.cached.mlp, PlainKernels(), self.cached.data)

    def weights(self, expert_idx: int) -> tuple[int, ExpertWeights]:
        slab, row = self.place(expert_idx)
        return expert_idx, ExpertWeights(NO_PARTS, slab.data[row], slab.data, row)

    def place(self, expert_idx: int) -> tuple[SlotSlab, int]:
        return (self.cached, PLACES[expert_idx]) if expert_idx in PLACES else (self.staged, STAGED[expert_idx])

    def output(self, expert_idx: int, x: torch.Tensor) -> torch.Tensor:
        slab, row = self.place(expert_idx)
        return slab.reference(row, x)


def batches(expert_ids: list[int], seed: int) -> Iterator[list[int]]:
    """The experts in any order, some at a time."""
    draw = random.Random(seed)
    draw.shuffle(expert_ids)
    while expert_ids:
        size = draw.randint(1, len(expert_ids))
        yield expert_ids[:size]
        del expert_ids[:size]


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("expert_ids", [[[1, 0]], [[2, 5], [ABSENT, 3], [5, 2]], [[4, 4]]])
def test_no_order_of_arrival_changes_a_bit(world: World, expert_ids: list[list[int]], dtype: torch.dtype):
    x, weights = torch.randn(len(expert_ids), 128).to(dtype), torch.rand(len(expert_ids), 2)
    chosen = sorted({expert_idx for row in expert_ids for expert_idx in row} - {ABSENT})
    results = []
    for seed in range(5):
        step = SlotStep(world.experts, x, expert_ids, weights)
        for batch in batches(list(chosen), seed):
            step.compute([world.weights(expert_idx) for expert_idx in batch])
        results.append(step.result)
    assert all(torch.equal(result, results[0]) for result in results)
    for row, (ids, result) in enumerate(zip(expert_ids, results[0], strict=True)):
        expected = sum(weights[row, k] * world.output(e, x[row]) for k, e in enumerate(ids) if e != ABSENT)
        assert isinstance(expected, torch.Tensor)
        assert_near(result, expected, 0.01 if dtype is torch.bfloat16 else 1e-4)


def test_an_output_that_was_computed_elsewhere_has_its_place(world: World):
    x, weights = torch.randn(3, 128), torch.rand(3, 2)
    ids = [[1, 3], [3, 3], [0, 1]]
    whole = SlotStep(world.experts, x, ids, weights)
    whole.compute([world.weights(expert_idx) for expert_idx in (0, 1, 3)])
    parted = SlotStep(world.experts, x, ids, weights)
    parted.compute([world.weights(1)])
    outputs = torch.empty(3, 2, 128)
    slab, row = world.place(3)
    slots = torch.tensor([[-1, row], [row, row], [-1, -1]], dtype=torch.int32)
    PlainKernels().decode_experts(slab.mlp, slab.data, slots, x, outputs)
    parted.put(3, torch.stack([outputs[0, 1], outputs[1, 0]]))
    parted.compute([world.weights(0)])
    assert torch.equal(parted.result, whole.result)


def test_rows_for_no_expert_are_zero(world: World):
    step = SlotStep(world.experts, torch.randn(2, 128), [[ABSENT, ABSENT]] * 2, torch.rand(2, 2))
    assert torch.equal(step.result, torch.zeros(2, 128))


def test_a_prompts_rows_go_to_their_experts_in_any_order(world: World):
    num_tokens, top_k = 12, 2
    index = torch.stack([torch.randperm(NUM_EXPERTS + 1)[:top_k] for _ in range(num_tokens)])  # 6: no expert
    x = torch.randn(num_tokens, 128)
    sorted_index, order = torch.sort(index.reshape(-1), stable=True)
    ends = torch.searchsorted(sorted_index, torch.arange(NUM_EXPERTS), right=True)
    results = []
    for seed in range(4):
        rows = SlotRows(world.experts, x, order, ends, is_partial=True)
        for batch in batches(list(range(NUM_EXPERTS)), seed):
            rows.compute([world.weights(expert_idx) for expert_idx in batch])
        results.append(rows.outputs)
    assert all(torch.equal(result, results[0]) for result in results)
    for pair, expert_idx in enumerate(index.reshape(-1).tolist()):
        if expert_idx == NUM_EXPERTS:
            assert not results[0][pair].any()
        else:
            assert_near(results[0][pair], world.output(expert_idx, x[pair // top_k]), 1e-4)
