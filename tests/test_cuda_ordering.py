"""Random steps and prefetches through residency and the CUDA tier, on a device that does things as late as it likes."""

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from fake_device import FakePageLock
from fake_world import PAGE, CpuBeside, World

from moe_offload.errors import ExpertReadError
from moe_offload.offload.tiers.cuda_tier import CudaTier
from moe_offload.offload.tiers.device_slot import DeviceSlot
from moe_offload.offload.tiers.host_slots import HostSlots
from moe_offload.offload.tiers.lender import LentExpert
from moe_offload.offload.tiers.slot_copy import SlotCopy
from moe_offload.offload.tiers.staging_ring import StagingRing

SEEDS_PER_TEST = 50
_lend = CudaTier.lend


def random_world(patch: pytest.MonkeyPatch, seed: int, failing: float = 0.0, damaged: float = 0.0) -> World:
    """Small enough that slots are always short somewhere."""
    draw = random.Random(seed)
    num_layers = draw.randint(1, 3)
    num_experts = [draw.randint(2, 6) for _ in range(num_layers)]
    patch.setattr(warnings, "warn", lambda *_, **__: None)  # of what is not page-locked
    return World(
        patch,
        num_experts=num_experts,
        num_slots=[draw.randint(1, n) for n in num_experts],
        num_host_slots=[draw.choice([0, draw.randint(1, n), n]) for n in num_experts],
        num_pages=[draw.choice([1, 2]) for _ in num_experts],
        num_staging_slots=draw.randint(1, 3),
        num_host_staging_slots=draw.randint(1, 4),
        num_devices=draw.choice([1, 1, 2]),
        page_lock=FakePageLock(draw.choice([None, None, 0, 16 * PAGE, 24 * PAGE])),
        seed=seed,
        failing=failing,
        damaged=damaged,
    )


class InterruptedStepError(Exception):
    """The model's own code failed in the middle of an expert."""


def random_step(world: World, num_experts: int, layer_idx: int, on_cpu: bool) -> None:
    draw = world.random
    beside = CpuBeside(world, layer_idx) if on_cpu and world.tier.lends(layer_idx) else None
    world.residency.miss_path = beside  # type: ignore[assignment]
    expert_ids = draw.sample(range(num_experts), draw.randint(1, num_experts))
    breaks = draw.random() < 0.05
    computed: list[int] = []
    if beside is not None:
        beside.order, beside.breaks = computed, draw.random() < 0.05

    def compute(expert_idx: int, weights: Any) -> None:
        computed.append(expert_idx)
        world.launch(layer_idx, expert_idx, weights)
        world.drift()
        if breaks:
            raise InterruptedStepError
        if draw.random() < 0.2:
            random_prefetch(world)

    try:
        world.residency.run(
            layer_idx,
            expert_ids,
            compute,
            prefill=draw.random() < 0.3,
            issued=(lambda: random_prefetch(world)) if draw.random() < 0.5 else None,
            host=beside,  # type: ignore[arg-type]
        )
    except ExpertReadError:
        assert world.reader.failing
    except InterruptedStepError:
        assert breaks
    except MemoryError:
        assert beside is not None
        assert beside.breaks
    else:
        assert sorted(computed) == sorted(expert_ids)


def random_prefetch(world: World) -> None:
    draw = world.random
    layer_idx = draw.randrange(world.cache.num_layers)
    num_experts = len([key for key in world.blobs if key[0] == layer_idx])
    guess = draw.sample(range(num_experts), draw.randint(1, num_experts))
    if draw.random() < 0.3:
        world.residency.cancel_prefetches(layer_idx, guess)
    else:
        world.residency.prefetch(layer_idx, guess)


def random_run(
    patch: pytest.MonkeyPatch, seed: int, failing: float = 0.0, damaged: float = 0.0, *, on_cpu: bool = False
) -> World:
    world = random_world(patch, seed, failing, damaged)
    for _ in range(12):
        for device in world.devices:
            device.current = world.random.choice(["compute", "compute", "another stream"])
        layer_idx = world.random.randrange(world.cache.num_layers)
        num_experts = len([key for key in world.blobs if key[0] == layer_idx])
        random_step(world, num_experts, layer_idx, on_cpu)
        world.drift()
        if world.random.random() < 0.4:
            random_prefetch(world)
    return world


@pytest.mark.parametrize("block", range(8))
@pytest.mark.parametrize(("failing", "damaged"), [(0.0, 0.0), (0.1, 0.2)])
@pytest.mark.parametrize("on_cpu", [False, True])
def test_kernels_see_their_experts(block: int, failing: float, damaged: float, on_cpu: bool):
    num_checked = 0
    for seed in range(block * SEEDS_PER_TEST, (block + 1) * SEEDS_PER_TEST):
        with pytest.MonkeyPatch.context() as patch:
            world = random_run(patch, seed, failing, damaged, on_cpu=on_cpu)
            world.finish()
            world.check()
            assert all(device.is_idle for device in world.devices)
            assert world.residency._num_behind == 0
            assert not world.reader.reads
            assert world.num_checked % 2 == 0
            num_checked += world.num_checked
            # All staging is back, and everything can still be had.
            world.reader.failing = 0.0
            for layer_idx in range(world.cache.num_layers):
                everything = [key[1] for key in world.blobs if key[0] == layer_idx]
                assert sorted(world.run(layer_idx, everything)) == everything
            world.residency.close()
            world.finish()
            world.check()
    assert num_checked > 1000


@pytest.mark.parametrize("block", range(2))
def test_closing_in_flight(block: int):
    """Whatever is under way when the model is closed ends, and nothing is written anywhere afterwards."""
    for seed in range(block * SEEDS_PER_TEST, (block + 1) * SEEDS_PER_TEST):
        with pytest.MonkeyPatch.context() as patch:
            world = random_run(patch, seed, on_cpu=seed % 2 == 1)
            random_prefetch(world)
            world.drift()
            world.residency.close()
            assert not world.reader.reads
            world.finish()
            assert not world.wrong
            assert not world.hazards
            with pytest.raises(ExpertReadError, match="closed"):
                world.tier.host.fetch(0, 0, speculative=False, keep=True, landed=print, failed=print)


def _nothing(_: object) -> None:
    pass


def _give_back_now(ring: StagingRing, slot: int, event: Any) -> None:
    ring.give_back(slot)


def _lend_only_a_look(tier: CudaTier, layer_idx: int, expert_idx: int, **calls: Any) -> None:
    def lent(expert: LentExpert) -> None:
        expert.give_back()
        calls["lent"](expert._replace(give_back=lambda: None))

    _lend(tier, layer_idx, expert_idx, lent=lent, failed=calls["failed"])


def _release_now(slots: HostSlots, lease: Any, event: Any) -> None:
    slots.release(lease)


def _nothing_has_flowed(copy: SlotCopy) -> None:
    return None


@pytest.mark.parametrize(
    ("owner", "method", "broken"),
    [
        (DeviceSlot, "use", _nothing),
        (DeviceSlot, "used", _nothing),
        (StagingRing, "give_back_after", _give_back_now),
        (HostSlots, "release_after", _release_now),
        (CudaTier, "lend", _lend_only_a_look),
        (SlotCopy, "flow_again", _nothing),
        (SlotCopy, "last_copy", _nothing_has_flowed),
    ],
)
def test_a_missing_order_is_found(owner: type, method: str, broken: Callable[..., None]):
    """Each of the orders that this file is about is needed, and runs without it do not pass."""
    faults = (0.3, 0.3) if owner is SlotCopy else (0.0, 0.0)
    for seed in range(SEEDS_PER_TEST):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, method, broken)
            world = random_run(patch, seed, *faults, on_cpu=owner is CudaTier)
            world.finish()
        if world.wrong or world.hazards:
            return
    pytest.fail("every run seemed to be right")
