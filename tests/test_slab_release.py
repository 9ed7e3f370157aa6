"""The memory of slots on a device: let go of when a layer changes its size or the model is closed, whatever fails."""

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda_model import Load, loading_on_fake_devices, tier_of
from fake_device import FakeDevice
from fake_world import World
from loaded_models import PROMPT, make_pack

from moe_offload.errors import BudgetError, ExpertCopyError

SLOT_BYTES = 16384


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("slabs"), "mixtral")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    with loading_on_fake_devices(monkeypatch) as load:
        yield load


class Memory:
    """Device memory that is seen to be freed."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.alive: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self.is_full = False
        patch.setattr(FakeDevice, "allocate", lambda device, size_bytes: self.allocate(size_bytes))

    @property
    def size_bytes(self) -> int:
        return sum(memory.nbytes for memory in self.alive.values())

    def allocate(self, size_bytes: int) -> torch.Tensor:
        if self.is_full and self.size_bytes + size_bytes > self.limit_bytes:
            raise BudgetError("the device refuses", needed_bytes=size_bytes, budget_bytes=self.limit_bytes)
        memory = np.zeros(size_bytes, np.uint8)
        self.alive[id(memory)] = memory
        return torch.from_numpy(memory)

    def fill(self) -> None:
        """Let there be room for nothing but what is there."""
        self.is_full, self.limit_bytes = True, self.size_bytes


def test_a_layer_that_gives_up_slots_finds_its_own_memory_free(pack: Path, load: Load, monkeypatch: pytest.MonkeyPatch):
    memory = Memory(monkeypatch)
    model = load(pack, slots_bytes=12 * SLOT_BYTES, host_bytes=12 * SLOT_BYTES)
    answer = model.generate(PROMPT, max_new_tokens=8)
    memory.fill()
    for layer_idx, num_slots in enumerate(model.plan.num_slots):
        assert num_slots > 1
        assert model._residency.resize(layer_idx, num_slots - 1)
        assert tier_of(model).slab(layer_idx).shape[0] == num_slots - 1
    assert memory.size_bytes < memory.limit_bytes
    assert model.generate(PROMPT, max_new_tokens=8) == answer
    model.close()
    assert memory.size_bytes == 0


def test_a_device_that_fails_does_not_keep_others_from_being_closed(monkeypatch: pytest.MonkeyPatch):
    world = World(monkeypatch, num_experts=[4] * 4, num_slots=[2] * 4, num_host_slots=[2] * 4, num_devices=2, seed=1)
    closed: list[FakeDevice] = []

    def fail() -> None:
        closed.append(world.devices[0])
        raise ExpertCopyError("the CUDA device failed while the last copies were awaited")

    close = world.devices[1].close
    monkeypatch.setattr(world.devices[0], "close", fail)
    monkeypatch.setattr(world.devices[1], "close", lambda: (closed.append(world.devices[1]), close()))
    world.residency.close()
    assert closed == world.devices
    assert world.devices[1].closed
    assert not world.device.page_lock.locked
