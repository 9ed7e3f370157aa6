"""Misses on the CPU beside a real device: what no fake one can show. Skipped without one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_config
from family_runs import CONTEXT_TOKENS, example_inputs, run_logits, save_random_model

from moe_offload import OffloadedModel
from moe_offload.errors import BudgetError
from moe_offload.offload.pack.packer import pack_model
from moe_offload.offload.tiers.cuda_queue import CudaQueue
from moe_offload.offload.tiers.host_rows import HostRows

pytestmark = pytest.mark.gpu
SLOT_BYTES = 16384


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def pack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = save_random_model(make_config(request.param), folder / "checkpoint")
    return pack_model(str(checkpoint), folder / "pack", format="nf4")


def load(pack: Path, miss_path: str, *, slots: int, host_slots: int) -> OffloadedModel:
    """On the device, with so many slots beyond the smallest budgets."""
    settings: dict[str, Any] = {"device": "cuda", "dtype": "float32", "context_tokens": CONTEXT_TOKENS}
    settings |= {"miss_path": miss_path, "prefetch": 1}
    with pytest.raises(BudgetError) as vram:
        OffloadedModel.from_pretrained(pack, vram=1, ram="80%", **settings)
    vram_bytes = vram.value.needed_bytes + slots * SLOT_BYTES
    with pytest.raises(BudgetError) as ram:
        OffloadedModel.from_pretrained(pack, vram=vram_bytes, ram=1, **settings)
    return OffloadedModel.from_pretrained(
        pack, vram=vram_bytes, ram=ram.value.needed_bytes + host_slots * SLOT_BYTES, **settings
    )


def test_logits_are_those_of_copying_to_rounding(pack: Path):
    results = {}
    for miss_path in ("copy", "cpu", "split", "auto"):
        with load(pack, miss_path, slots=0, host_slots=100) as model:
            inputs = {k: v.to("cuda") for k, v in example_inputs(model.model.config).items()}
            results[miss_path] = run_logits(model.model, inputs)
            if miss_path in ("cpu", "split"):
                assert model.stats.computed_on_cpu > 0
            model._residency.cache.check_integrity()
    tokens, logits = results["copy"]
    for other_tokens, other_logits in results.values():
        assert torch.equal(other_tokens, tokens)
        torch.testing.assert_close(other_logits, logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_wait_for_what_is_launched_after_them(dtype: torch.dtype):
    queue = CudaQueue(torch.device("cuda"))
    rows = HostRows(queue)
    for turn in range(3):
        x = torch.randn(2, 64 << turn, device="cuda").to(dtype)
        index = torch.randint(0, 9, (2, 4), device="cuda")
        expected = x.cpu(), index.cpu()
        rows.fetch(x, index)
        torch.cuda._sleep(200_000_000)  # the hits are being computed
        late = queue.new_event()
        queue.record(late)
        here, chosen = rows.rows()
        assert not late.is_over(), "the host has its rows while the device is busy"
        assert torch.equal(here, expected[0])
        assert torch.equal(chosen, expected[1])
        outputs = rows.outputs(3)
        outputs.copy_(torch.arange(outputs.numel()).view_as(outputs))
        there = rows.send(outputs, x.device)
        assert not late.is_over(), "and does not wait until its answer has arrived"
        assert torch.equal(there.cpu(), outputs)
    rows.close()
    queue.close()


def test_copies_are_timed():
    queue = CudaQueue(torch.device("cuda"))
    source = torch.zeros(32 << 20, dtype=torch.uint8, pin_memory=True)
    target = queue.allocate(source.numel())
    for _ in range(3):
        event = queue.new_event()
        queue.copy(source, target, after=[], event=event)
        event.wait()
    bytes_per_s = 1 / queue.copy_s_per_byte
    assert 0.2e9 < bytes_per_s < 200e9
    queue.close()
