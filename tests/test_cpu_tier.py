"""The CPU tier on its own: what a step meets that another thread closes the tier under."""

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_device import FakeDevice
from fake_reader import FakeReader
from fake_world import make_manifest

from moe_offload.errors import ConfigError
from moe_offload.offload.tiers.cpu_tier import CpuTier


def make_tier() -> CpuTier:
    reader: object = FakeReader({}, FakeDevice())
    return CpuTier(make_manifest([2], [1]), reader, num_slots=[1], num_staging_slots=1)  # type: ignore[arg-type]


@pytest.fixture
def short_turns() -> Iterator[None]:
    """Threads take turns after a few lines."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_a_closed_tier_says_so() -> None:
    tier = make_tier()
    tier.close()
    for slot in (0, -1):
        with pytest.raises(ConfigError, match="closed"):
            tier.use(0, slot)
    with pytest.raises(ConfigError, match="closed"):
        tier.exchange(0, 0, -1)


def use_until_it_fails(tier: CpuTier, begun: threading.Event) -> None:
    while True:
        tier.use(0, 0)
        tier.use(0, -1)
        begun.set()


@pytest.mark.usefixtures("short_turns")
def test_closing_while_slots_are_used() -> None:
    """At whatever line the tier is closed, who uses it gets an error of ours, never a list that has become empty."""
    with ThreadPoolExecutor(1) as pool:
        for _ in range(100):
            tier, begun = make_tier(), threading.Event()
            using = pool.submit(use_until_it_fails, tier, begun)
            begun.wait()
            tier.close()
            with pytest.raises(ConfigError, match="closed"):
                using.result()
