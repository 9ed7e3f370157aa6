"""Runs a tiny random model of a family twice, by transformers alone and from a pack, and compares the two."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import make_config
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeExperts

from moe_offload import OffloadedModel
from moe_offload.errors import BudgetError
from moe_offload.offload import model as model_module
from moe_offload.offload.checkpoint.transformers_loading import auto_class
from moe_offload.offload.pack.manifest import is_pack
from moe_offload.offload.pack.packer import pack_model

transformers.logging.disable_progress_bar()

DECODE_STEPS = 8
CONTEXT_TOKENS = 64


@dataclass(frozen=True)
class FamilyRun:
    """What came of a family. ``difference`` is the largest of any logit, ``scale`` the largest logit."""

    name: str
    experts_class: str
    is_decorated: bool
    num_expert_layers: int
    num_slots: tuple[int, ...]
    difference: float
    scale: float
    same_tokens: bool
    num_lookahead_layers: int

    @property
    def relative_difference(self) -> float:
        return self.difference / self.scale


def randomize(model: nn.Module) -> None:
    """Weights large enough for routers to tell tokens apart, and biases that are not zero."""
    for name, param in model.named_parameters():
        if param.dim() >= 2:
            nn.init.normal_(param, std=0.25)
        elif "bias" in name:
            nn.init.normal_(param, std=0.1)
    for name, buffer in model.named_buffers():
        if "correction" in name or "expert_bias" in name:
            nn.init.normal_(buffer, std=0.1)


def save_random_model(config: PreTrainedConfig, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A sharded checkpoint with seeded random weights."""
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, dtype=torch.float32)
    randomize(model)
    model.to(dtype).save_pretrained(folder, max_shard_size="60KB")
    return folder


def example_inputs(config: PreTrainedConfig, batch_size: int = 2, num_tokens: int = 11) -> dict[str, torch.Tensor]:
    """A seeded prompt, with something to begin the answer with where there is a decoder of its own."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"input_ids": (batch_size, num_tokens)}
    if config.is_encoder_decoder:
        shapes["decoder_input_ids"] = (batch_size, 7)
    return {name: torch.randint(3, 120, shape, generator=generator) for name, shape in shapes.items()}


def load_smallest(folder: Path, *, pack_dir: Path | None = None, format: str = "auto", **kwargs: Any) -> OffloadedModel:
    """Load a pack, or a checkpoint packed first, under the smallest budget there is: one slot a layer."""
    settings = {"device": "cpu", "dtype": "float32", "context_tokens": CONTEXT_TOKENS} | kwargs
    pack = folder if is_pack(folder) else pack_model(str(folder), pack_dir, format=format)
    with pytest.raises(BudgetError) as refusal:
        OffloadedModel.from_pretrained(pack, ram=1, **settings)
    make_plan = model_module.make_plan

    def plan_without_more(*args: Any, **options: Any) -> Any:
        plan = make_plan(*args, **options)
        return replace(plan, num_slots=plan.fewest_slots, least_room=None)

    with pytest.MonkeyPatch.context() as patch:  # what a text leaves of it would hold more of a tiny model
        patch.setattr(model_module, "make_plan", plan_without_more)
        return OffloadedModel.from_pretrained(pack, ram=refusal.value.needed_bytes, **settings)


@torch.no_grad()
def run_logits(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens, and the logits of the whole prompt and of every decode step, in one row each."""
    prefill = model(**inputs).logits
    output = model.generate(
        **inputs,
        max_new_tokens=DECODE_STEPS + 1,
        min_new_tokens=DECODE_STEPS + 1,
        do_sample=False,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    rows = [prefill.reshape(-1, prefill.shape[-1]), *output.logits]
    return output.sequences, torch.cat([row.to(output.sequences.device) for row in rows])  # of several GPUs, the last


def _corrected_nllb_forward(
    self: Any, hidden_states: torch.Tensor, router_mask: torch.Tensor, router_probs: torch.Tensor
) -> torch.Tensor:
    """As transformers 4 had it: the mask is one-hot already; transformers 5 makes it so once more."""
    combined = torch.zeros_like(hidden_states)
    for expert_idx in range(self.num_experts):
        tokens = router_probs[:, expert_idx].bool()
        if tokens.any():
            weights = router_probs[tokens, expert_idx].unsqueeze(-1) * (1 - self.moe_token_dropout)
            combined[tokens] += weights * self[f"expert_{expert_idx}"](hidden_states[tokens])
    return combined


@contextmanager
def correct_reference() -> Iterator[None]:
    """The reference, where transformers itself is wrong."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NllbMoeExperts, "forward", _corrected_nllb_forward)
        yield


def run_family(name: str, folder: Path) -> FamilyRun:
    """Save, pack, load under the smallest budget, and compare with transformers."""
    config = make_config(name)
    checkpoint = save_random_model(config, folder / "checkpoint")
    inputs = example_inputs(config)
    with correct_reference():
        reference = auto_class(config).from_pretrained(checkpoint, experts_implementation="eager").eval()
        expected_tokens, expected = run_logits(reference, inputs)
    del reference
    gc.collect()
    with load_smallest(checkpoint, pack_dir=folder / "pack", format="source", prefetch=1) as offloaded:
        tokens, logits = run_logits(offloaded.model, inputs)
        offloaded._residency.cache.check_integrity()
        containers = [offloaded.model.get_submodule(layer.module) for layer in offloaded.manifest.layers]
        return FamilyRun(
            name=name,
            experts_class=", ".join(sorted({type(container).__name__ for container in containers})),
            is_decorated=all(hasattr(container, "is_concatenated") for container in containers),
            num_expert_layers=len(containers),
            num_slots=offloaded.plan.num_slots,
            difference=float((logits - expected).abs().max()),
            scale=float(expected.abs().max()),
            same_tokens=torch.equal(tokens, expected_tokens),
            num_lookahead_layers=offloaded._meter._lookahead.num_sites,
        )
