"""Models whose decode steps go through one call a layer say what they say with experts computed one by one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_config
from family_runs import CONTEXT_TOKENS, example_inputs, run_logits, save_random_model

from moe_offload import OffloadedModel
from moe_offload.offload.pack.packer import pack_model
from moe_offload.quant import kernels
from moe_offload.quant.moe_layer import MoeStep

# One of every kind of container and activation that kernels know.
FAMILIES = (
    "mixtral",
    "gpt_oss",
    "deepseek_v4",
    "gemma4_text",
    "nemotron_h",
    "dbrx",
    "longcat_flash",
    "step3p7",
    "switch_transformers",
    "nllb_moe",
)

pytestmark = pytest.mark.skipif(kernels.available() == ("torch",), reason="no kernels were built")


@pytest.mark.parametrize(("family", "spec"), [*((family, "int8") for family in FAMILIES), ("gpt_oss", "bf16")])
def test_one_call_says_what_experts_one_by_one_say(family: str, spec: str, tmp_path: Path, monkeypatch: Any) -> None:
    config = make_config(family)
    save_random_model(config, tmp_path / "checkpoint")
    pack = pack_model(str(tmp_path / "checkpoint"), tmp_path / "pack", format=spec)
    num_calls = 0
    call = kernels.moe_layer

    def counted(*args: Any) -> None:
        nonlocal num_calls
        num_calls += 1
        call(*args)

    monkeypatch.setattr(kernels, "moe_layer", counted)
    inputs = example_inputs(config, batch_size=1)
    settings: dict[str, Any] = {"device": "cpu", "ram": "1GiB", "context_tokens": CONTEXT_TOKENS}
    with OffloadedModel.from_pretrained(pack, dtype="float32", prefetch="off", **settings) as model:
        tokens, logits = run_logits(model.model, inputs)
        steps = num_calls
        monkeypatch.setattr(MoeStep, "takes", staticmethod(lambda x: False))
        expected_tokens, expected = run_logits(model.model, inputs)
    assert steps > 0
    assert num_calls == steps
    assert torch.equal(tokens, expected_tokens)
    assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-5
