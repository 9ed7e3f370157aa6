"""Every family gives transformers' own logits and tokens while its slots hold no more than one token's experts."""

import re
from pathlib import Path

import pytest
import torch
from families import FAMILIES, MORE_FAMILIES, make_config
from family_runs import run_family, save_random_model
from torch import nn
from transformers import AutoConfig
from transformers.models.jetmoe import modeling_jetmoe

from moe_offload.errors import UnsupportedModelError
from moe_offload.offload.experts.containers import find_expert_containers
from moe_offload.offload.pack.packer import pack_model

DOC = Path(__file__).parent.parent / "docs" / "models.md"
# Fused sums of transformers' in another order than ours; 1e-6 of the scale is what fp32 gives.
TOLERANCE = 1e-5
# DeepSeek-V4 looks tokens up in a table instead of asking the routers of its first layers; NLLB's
# encoder hands its padding to the routers.
WITHOUT_LOOKAHEAD = {"deepseek_v4": 1, "nllb_moe": 2}


@pytest.mark.parametrize("name", [*FAMILIES, *MORE_FAMILIES])
def test_logits_and_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    run = run_family(name, tmp_path)
    assert run.num_slots == (1,) * run.num_expert_layers
    assert run.same_tokens
    assert run.relative_difference <= TOLERANCE
    assert run.num_lookahead_layers == run.num_expert_layers - WITHOUT_LOOKAHEAD.get(name, 0)


def test_the_document_lists_the_families_tested() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|", DOC.read_text(), re.MULTILINE)
    assert rows == [*FAMILIES, *MORE_FAMILIES], "run benchmarks/families_table.py"


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    save_random_model(config, tmp_path / "checkpoint")
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has no experts"):
        pack_model(str(tmp_path / "checkpoint"), tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


class NovelExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 8, 8))


class NovelMlp(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)


class NovelSharedExperts(NovelExperts):
    pass


class NovelModel(nn.Module):
    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        self.block = nn.ModuleDict(modules)


@pytest.mark.parametrize(
    ("modules", "named"),
    [
        ({"mixture": NovelExperts()}, "NovelExperts"),
        ({"experts": nn.ModuleList([NovelMlp(), NovelMlp()])}, "NovelMlp"),
        ({"experts": NovelMlp()}, "NovelMlp"),
        ({"shared_experts": NovelSharedExperts(), "mixture": NovelExperts()}, "NovelExperts"),
    ],
    ids=["stacked", "list", "attribute", "beside shared ones"],
)
def test_experts_of_an_unknown_class_are_refused_by_name(modules: dict[str, nn.Module], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"NovelModel holds experts of a class .* here: {named};"):
        find_expert_containers(NovelModel(**modules))


def test_shared_experts_alone_are_no_experts() -> None:
    with pytest.raises(UnsupportedModelError, match="NovelModel has no experts"):
        find_expert_containers(NovelModel(shared_experts=NovelSharedExperts()))


def test_a_checkpoint_with_an_unknown_class_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on the whole way, as if transformers had brought a family that is not known here."""
    save_random_model(make_config("jetmoe"), tmp_path / "checkpoint")
    renamed = type("FutureParallelExperts", (modeling_jetmoe.JetMoeParallelExperts,), {})
    monkeypatch.setattr(modeling_jetmoe, "JetMoeParallelExperts", renamed)
    with pytest.raises(UnsupportedModelError, match="FutureParallelExperts"):
        pack_model(str(tmp_path / "checkpoint"), tmp_path / "pack")
    assert not (tmp_path / "pack").exists()
