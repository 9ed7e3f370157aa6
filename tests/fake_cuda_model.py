"""Loads models as ``device="cuda"`` would, with a fake device in place of the GPU and everything else as it is."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_device import FakeDevice
from family_runs import CONTEXT_TOKENS

from moe_offload import OffloadedModel
from moe_offload.errors import BudgetError
from moe_offload.offload import model as model_module
from moe_offload.offload.planning.plan import Plan, make_plan
from moe_offload.offload.tiers import choice as tiers
from moe_offload.offload.tiers.cuda_tier import CudaTier

Load = Callable[..., OffloadedModel]


@contextmanager
def loading_on_fake_devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """What loads, with so many bytes of VRAM and RAM for experts beyond the smallest budgets; closes the models."""
    with ExitStack() as stack:

        def plan(*args: Any, slots_bytes: int, host_bytes: int, **kwargs: Any) -> Plan:
            settings = kwargs | {"device": "cuda"}
            with pytest.raises(BudgetError) as vram:
                make_plan(*args, **settings | {"vram_bytes": 1, "ram_bytes": 1 << 40})
            settings["vram_bytes"] = vram.value.needed_bytes + slots_bytes
            with pytest.raises(BudgetError) as ram:
                make_plan(*args, **settings | {"ram_bytes": 1})
            return make_plan(*args, **settings | {"ram_bytes": ram.value.needed_bytes + host_bytes})

        def load(pack: Path, *, slots_bytes: int, host_bytes: int, seed: int = 0, **kwargs: Any) -> OffloadedModel:
            def queue(device: torch.device) -> FakeDevice:
                fake = FakeDevice(seed, eager=True)
                fake.run_in_background()
                return fake

            with monkeypatch.context() as patch:
                patch.setattr(model_module, "make_plan", partial(plan, slots_bytes=slots_bytes, host_bytes=host_bytes))
                patch.setattr(tiers, "CudaQueue", queue)
                settings = {"device": "cpu", "dtype": "float32", "context_tokens": CONTEXT_TOKENS}
                return stack.enter_context(OffloadedModel.from_pretrained(pack, **settings | kwargs))

        yield load


def tier_of(model: OffloadedModel) -> CudaTier:
    tier = model._residency._tier
    assert isinstance(tier, CudaTier)
    return tier
