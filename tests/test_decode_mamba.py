"""Fused decode steps of models with Mamba 2 layers against their own forwards."""

from functools import cache
from typing import Any

import pytest
import torch
from decode_runs import DECODE_STEPS, PROMPT_TOKENS, close, counted_calls, decode, fused, pack_of
from family_runs import load_smallest

from moe_offload.offload.decode.mamba import FusedMamba
from moe_offload.quant import backend_name
from moe_offload.quant.mamba_step import MambaCall

pytestmark = pytest.mark.skipif(backend_name() == "torch", reason="no kernels were built")

FAMILIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "granitemoehybrid": (
        {"layer_types": ["mamba", "attention", "mamba"], "mamba_n_groups": 2},
        ["model.layers.0.mamba", "model.layers.2.mamba"],
    ),
    "nemotron_h": (
        {"layers_block_type": ["mamba", "moe", "attention", "mamba"], "n_groups": 2},
        ["model.layers.0.mixer", "model.layers.3.mixer"],
    ),
}


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cache(lambda family: pack_of(family, tmp_path_factory.mktemp(family), **FAMILIES[family][0]))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """An entry for every token that went through the kernel."""
    return counted_calls(MambaCall, monkeypatch)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_eager_model(family, both, calls):
    model, eager = both(family)
    assert not fused(eager, FusedMamba)
    assert fused(model, FusedMamba) == FAMILIES[family][1]
    calls.clear()  # what loading tried
    assert close(decode(model), decode(eager), tolerance=1e-3)
    assert len(calls) == 2 * (DECODE_STEPS - 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_sixteen_bits_are_fused(family, dtype, packs):
    with load_smallest(packs(family), dtype=str(dtype).partition(".")[2]) as model:
        assert len(fused(model.model, FusedMamba)) == 2


@pytest.mark.parametrize("options", [{"batch_size": 2}, {"num_beams": 3}, {"use_cache": False}])
def test_whatever_is_not_one_plain_token_goes_the_old_way(options, both, calls):
    model, eager = both("granitemoehybrid")
    calls.clear()
    assert close(decode(model, **options), decode(eager, **options), tolerance=1e-3)
    assert not calls


def test_a_mask_that_hides_something_is_heeded(both):
    model, eager = both("granitemoehybrid")
    padded = {"attention_mask": torch.tensor([[0] * 3 + [1] * (PROMPT_TOKENS - 3)])}
    assert close(decode(model, **padded), decode(eager, **padded), tolerance=1e-3)
