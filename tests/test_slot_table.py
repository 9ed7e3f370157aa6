"""Steps that find their slots by a table, while a residency fills them: no byte is read that is not the expert's."""

import itertools
import random

import pytest
import torch
from fake_world import World

from moe_offload.offload.experts.weights import ExpertWeights
from moe_offload.offload.graphs.slot_table import SlotTable
from moe_offload.offload.graphs.speculation import FIRST_STEPS, MOST_STEPS, Speculation

NUM_EXPERTS = [6, 4]


@pytest.mark.parametrize("seed", range(20))
def test_what_a_step_may_find_is_what_the_table_says(monkeypatch: pytest.MonkeyPatch, seed: int):
    world = World(monkeypatch, num_experts=NUM_EXPERTS, num_slots=[3, 2], num_host_slots=[2, 2], seed=seed)
    draw = random.Random(seed)
    table = SlotTable(NUM_EXPERTS, torch.device("cpu"), world.tier.slot_order())
    world.residency.slot_listener = table
    num_found = 0
    for _ in range(40):
        layer_idx = draw.randrange(2)
        experts = list(range(NUM_EXPERTS[layer_idx]))
        action = draw.random()
        if action < 0.4:
            world.run(layer_idx, draw.sample(experts, 2))
        elif action < 0.6:
            world.residency.prefetch(layer_idx, draw.sample(experts, 2))
        else:
            world.device.current = draw.choice(["compute", "another"])
            with table.step():
                for layer, row in enumerate(table.device.tolist()):
                    for expert_idx, slot in enumerate(row):
                        if slot >= 0:  # a kernel that reads whatever the table names
                            num_found += 1
                            data = world.tier.slab(layer)[slot]
                            world.launch(layer, expert_idx, ExpertWeights(world.tier.layout(layer), data))
            world.device.current = "compute"
        world.drift()
    world.finish()
    world.check()
    assert num_found
    assert world.num_checked
    for layer_idx in range(2):
        table.check_integrity(layer_idx, world.cache.resident(layer_idx))
    table.close()
    assert not table.num_resident()


def test_steps_are_launched_whole_after_some_that_missed_nothing_and_ever_later_after_errors():
    speculation = Speculation()
    waits = []
    for _ in range(10):
        num_steps = 0
        while not speculation.is_on:
            speculation.record(missed=False)
            num_steps += 1
        waits.append(num_steps)
        speculation.record(missed=True)
    assert waits[0] == FIRST_STEPS
    assert all(later == min(2 * wait, MOST_STEPS) for wait, later in itertools.pairwise(waits))
    for _ in range(3 * MOST_STEPS):
        speculation.record(missed=False)
    speculation.record(missed=True)
    for _ in range(2 * FIRST_STEPS):
        speculation.record(missed=False)
    assert speculation.is_on
