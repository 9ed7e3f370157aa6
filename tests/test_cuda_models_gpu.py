"""Whole models of several families on a CUDA device, under the smallest budgets: what the CPU gives, to rounding."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, MORE_FAMILIES, make_config
from family_runs import CONTEXT_TOKENS, example_inputs, run_logits, save_random_model

from moe_offload import OffloadedModel
from moe_offload.errors import BudgetError
from moe_offload.offload.pack.packer import pack_model

pytestmark = pytest.mark.gpu


def load(pack: Path, **kwargs: Any) -> OffloadedModel:
    """On the device, under the smallest budgets."""
    settings = {"device": "cuda", "dtype": "float32", "context_tokens": CONTEXT_TOKENS} | kwargs
    with pytest.raises(BudgetError) as vram:
        OffloadedModel.from_pretrained(pack, vram=1, ram="80%", **settings)
    with pytest.raises(BudgetError) as ram:
        OffloadedModel.from_pretrained(pack, vram=vram.value.needed_bytes, ram=1, **settings)
    return OffloadedModel.from_pretrained(pack, vram=vram.value.needed_bytes, ram=ram.value.needed_bytes, **settings)


@pytest.mark.parametrize("name", [*FAMILIES, *MORE_FAMILIES])
def test_every_family_gives_what_the_cpu_gives(name: str, tmp_path: Path):
    config = make_config(name)
    pack = pack_model(str(save_random_model(config, tmp_path / "checkpoint")), tmp_path / "pack", format="source")
    inputs = example_inputs(config)
    with OffloadedModel.from_pretrained(pack, device="cpu", dtype="float32", context_tokens=CONTEXT_TOKENS) as resident:
        expected_tokens, expected = run_logits(resident.model, inputs)
    with load(pack, prefetch=1) as model:
        tokens, logits = run_logits(model.model, {key: value.to("cuda") for key, value in inputs.items()})
        model._residency.cache.check_integrity()
    assert torch.equal(tokens.cpu(), expected_tokens)
    scale = float(expected.abs().max())
    torch.testing.assert_close(logits.cpu() / scale, expected / scale, rtol=0, atol=1e-4)


@pytest.mark.parametrize("miss_path", ["copy", "cpu", "split", "auto"])
@pytest.mark.parametrize("format", ["nf4", "int4", "int8", "mxfp4", "fp8", "nf3"])
def test_formats_and_miss_paths(format: str, miss_path: str, tmp_path: Path):
    config = make_config("qwen3_moe")
    pack = pack_model(str(save_random_model(config, tmp_path / "checkpoint")), tmp_path / "pack", format=format)
    inputs = example_inputs(config, 1)
    with OffloadedModel.from_pretrained(pack, device="cpu", dtype="float32", context_tokens=CONTEXT_TOKENS) as resident:
        expected_tokens, expected = run_logits(resident.model, inputs)
    with load(pack, prefetch="auto", miss_path=miss_path) as model:
        tokens, logits = run_logits(model.model, {key: value.to("cuda") for key, value in inputs.items()})
    assert torch.equal(tokens.cpu(), expected_tokens)
    torch.testing.assert_close(logits.cpu(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif("simulated_cuda.bindings" not in sys.modules, reason="only a simulated driver refuses when told to")
def test_memory_that_is_not_page_locked_changes_no_bit(tmp_path: Path):
    config = make_config("mixtral")
    pack = pack_model(str(save_random_model(config, tmp_path / "checkpoint")), tmp_path / "pack", format="source")
    inputs = {key: value.to("cuda") for key, value in example_inputs(config).items()}
    with load(pack) as model:
        expected = run_logits(model.model, inputs)
    runtime = sys.modules["simulated_cuda.bindings"].runtime
    runtime.limit_pinned(0)
    try:
        with pytest.warns(match="not page-locked"):
            model = load(pack)
        with model:
            tokens, logits = run_logits(model.model, inputs)
    finally:
        runtime.limit_pinned((1 << 64) - 1)
    assert torch.equal(tokens, expected[0])
    assert torch.equal(logits, expected[1])
