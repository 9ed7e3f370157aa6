"""Experts with known bytes, a `CudaTier` on a fake device that reads them, and a `Residency` that drives it."""

import queue
import random
from collections import deque
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_device import FakeDevice, FakePageLock
from fake_reader import FakeReader

from moe_offload.cache import ExpertCache
from moe_offload.offload.experts import arrivals as arrivals_module
from moe_offload.offload.experts import residency as residency_module
from moe_offload.offload.experts.residency import Residency
from moe_offload.offload.experts.weights import ExpertWeights
from moe_offload.offload.pack.manifest import LayerLayout, LayerSpec, PackManifest
from moe_offload.offload.tiers import slot_copy
from moe_offload.offload.tiers.cuda_tier import CudaTier

PAGE = 4096


def make_manifest(num_experts: Sequence[int], num_pages: Sequence[int]) -> PackManifest:
    """A pack without files; an expert is one bf16 part that fills its slot."""
    layers = []
    for layer_idx, (experts, pages) in enumerate(zip(num_experts, num_pages, strict=True)):
        layout = LayerLayout.of(
            f"layers.{layer_idx}", experts, [("weight", (pages * PAGE // 2,), "bf16", pages * PAGE)]
        )
        layers.append(
            LayerSpec(
                layout.module, experts, layout.slot_bytes, layout.parts, f"{layer_idx}", PAGE, ("0" * 16,) * experts
            )
        )
    return PackManifest("tiny", None, "bf16", "source", "tests", tuple(layers), (), {})


def bytes_of(weights: ExpertWeights) -> torch.Tensor:
    """The slot itself, to look at later."""
    return weights.tensor("weight", torch.bfloat16).view(torch.uint8)


class CpuBeside:
    """Stands in for a `MissPath` and for its `HostStep`s: any number of misses is for the CPU, which checks them."""

    def __init__(self, world: "World", layer_idx: int) -> None:
        self.world, self.layer_idx, self.lender = world, layer_idx, world.tier
        self.order: list[int] = []
        self.breaks = False

    def num_copied(self, layer_idx: int, num_missing: int) -> int:
        return self.world.random.choice([0, self.world.random.randint(0, num_missing)])

    def computed(self, layer_idx: int, num_experts: int, seconds: float) -> None:
        assert (layer_idx, num_experts, seconds) == (self.layer_idx, self.num_experts, 0.25)

    def compute(self, experts: Sequence[tuple[int, ExpertWeights]]) -> float:
        self.num_experts = len(experts)
        for expert_idx, weights in experts:
            self.order.append(expert_idx)
            data = bytes_of(weights)
            self.world.device.cpu_reads(data, self.world.checked(self.layer_idx, expert_idx, data, "on the CPU"))
            self.world.drift()
            if self.breaks:
                raise MemoryError
        return 0.25


class World:
    """Everything that happens beside the thread under test. That thread is the only one: where it would block, the
    world goes on instead, so a run follows from its seed alone.
    """

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        *,
        num_experts: Sequence[int],
        num_slots: Sequence[int],
        num_host_slots: Sequence[int],
        num_pages: Sequence[int] | None = None,
        num_staging_slots: int = 2,
        num_host_staging_slots: int = 2,
        seed: int = 0,
        failing: float = 0.0,
        damaged: float = 0.0,
        page_lock: FakePageLock | None = None,
        num_devices: int = 1,
    ) -> None:
        self.random = random.Random(seed)
        patch.setattr(slot_copy, "PIECE_BYTES", self.random.choice([PAGE // 8, PAGE // 2, PAGE, 4 * PAGE]))
        self.device = FakeDevice(seed, page_lock=page_lock)
        self.devices = [self.device]
        self.devices += [FakeDevice(seed + number, beside=self.device) for number in range(1, num_devices)]
        self.device_of_layer = [self.random.randrange(num_devices) for _ in num_experts]
        manifest = make_manifest(num_experts, num_pages or [1] * len(num_experts))
        self.blobs = {
            (layer_idx, expert_idx): self.random.randbytes(layer.slot_bytes)
            for layer_idx, layer in enumerate(manifest.layers)
            for expert_idx in range(layer.num_experts)
        }
        self.reader = FakeReader(self.blobs, self.device, seed, failing, damaged)
        world = self

        class PumpedQueue:
            """A `queue.SimpleQueue` whose reader lets the world go on instead of blocking."""

            def __init__(self) -> None:
                self.items: deque[Any] = deque()
                self.put = self.items.append

            def get(self, block: bool = True, timeout: float | None = None) -> Any:
                world.drift()
                while not self.items:
                    if not block:
                        raise queue.Empty
                    assert world.step(), "a step waits for what nobody brings"
                return self.items.popleft()

            def get_nowait(self) -> Any:
                return self.get(block=False)

        for module in (residency_module, arrivals_module):
            patch.setattr(module, "queue", SimpleNamespace(SimpleQueue=PumpedQueue, Empty=queue.Empty))
        self.tier = CudaTier(
            manifest,
            self.reader,  # type: ignore[arg-type]
            self.devices,
            device_of_layer=self.device_of_layer,
            num_slots=num_slots,
            num_staging_slots=num_staging_slots,
            num_host_slots=num_host_slots,
            num_host_staging_slots=num_host_staging_slots,
        )
        self.cache = ExpertCache(num_experts, num_slots)
        self.residency = Residency(self.cache, self.tier)
        self.num_checked = 0
        self.wrong: list[str] = []

    @property
    def hazards(self) -> list[str]:
        return [hazard for device in self.devices for hazard in device.hazards]

    def step(self) -> bool:
        """A device or the disk does one thing; False if none has anything to do."""
        doers = [*(device.step for device in self.devices), self.reader.step]
        return any(do() for do in self.random.sample(doers, len(doers)))

    def drift(self) -> None:
        """A few steps, or none."""
        while self.random.random() < 0.6 and self.step():
            pass

    def finish(self) -> None:
        """Until nothing is left to do."""
        while self.step():
            pass

    def launch(self, layer_idx: int, expert_idx: int, weights: ExpertWeights) -> None:
        """A kernel that wants exactly this expert's bytes."""
        data = bytes_of(weights)
        device = self.devices[self.device_of_layer[layer_idx]]
        device.kernel(data, self.checked(layer_idx, expert_idx, data, "in a kernel"))

    def checked(self, layer_idx: int, expert_idx: int, data: torch.Tensor, where: str) -> Callable[[str], None]:
        """What compares ``data`` with the expert's bytes."""
        expected = torch.frombuffer(bytearray(self.blobs[layer_idx, expert_idx]), dtype=torch.uint8)

        def check(when: str) -> None:
            self.num_checked += 1
            if not torch.equal(data, expected):
                self.wrong.append(f"expert {expert_idx} of layer {layer_idx} {where}, at its {when}")

        return check

    def run(self, layer_idx: int, expert_ids: Sequence[int], **kwargs: Any) -> list[int]:
        """A step that launches one kernel for each expert; the order in which it did."""
        order: list[int] = []

        def compute(expert_idx: int, weights: ExpertWeights) -> None:
            order.append(expert_idx)
            self.launch(layer_idx, expert_idx, weights)

        self.residency.run(layer_idx, expert_ids, compute, **kwargs)
        return order

    def check(self) -> None:
        """Nothing went wrong so far."""
        assert not self.wrong
        assert not self.hazards
        self.cache.check_integrity()
        self.tier.host.check_integrity()
