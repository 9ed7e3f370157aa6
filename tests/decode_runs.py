"""A tiny model twice, its decode steps fused and eager, for tests of what is fused."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_config
from family_runs import example_inputs, load_smallest, save_random_model

from moe_offload.offload.pack.packer import pack_model

PROMPT_TOKENS, DECODE_STEPS = 11, 12
_TOLERANCE = 2e-5


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = _TOLERANCE) -> bool:
    """Whether logits are the same but for rounding."""
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def pack_of(family: str, folder: Path, dense_format: str = "source", **overrides: Any) -> Path:
    """A pack of random weights in fp32."""
    checkpoint = save_random_model(make_config(family, **overrides), folder / "checkpoint")
    return pack_model(str(checkpoint), folder / "pack", format="source", dense_format=dense_format)


@contextmanager
def loaded_twice(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], tuple[Any, Any]]]:
    """Loads a pack as a fused model and an eager one."""
    opened = []

    def get(pack: Path) -> tuple[Any, Any]:
        for mode in ("fused", "eager"):
            monkeypatch.setenv("MOE_OFFLOAD_DENSE", mode)
            opened.append(load_smallest(pack, context_tokens=512))
        return opened[-2].model, opened[-1].model

    yield get
    for model in opened:
        model.close()


def fused(model: Any, kind: type) -> list[str]:
    """The modules whose forward is a ``kind``."""
    return [name for name, module in model.named_modules() if isinstance(module.__dict__.get("forward"), kind)]


def counted_calls(call: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The position of every token that goes through the kernel ``call`` from now on."""
    positions: list[int] = []
    run = call.__call__

    def counted(self: Any, *args: Any) -> torch.Tensor:
        positions.append(args[-1])
        result: torch.Tensor = run(self, *args)
        return result

    monkeypatch.setattr(call, "__call__", counted)
    return positions


@torch.inference_mode()
def decode(model: Any, batch_size: int = 1, **options: Any) -> torch.Tensor:
    """The logits of greedy steps ``[steps, batch, vocabulary]``."""
    inputs = example_inputs(model.config, batch_size, PROMPT_TOKENS)
    output = model.generate(
        **inputs,
        max_new_tokens=DECODE_STEPS,
        min_new_tokens=DECODE_STEPS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return torch.stack(output.logits)


@torch.inference_mode()
def step(model: Any, cache: Any, tokens: list[int]) -> torch.Tensor:
    """The logits of some more tokens."""
    logits: torch.Tensor = model(input_ids=torch.tensor([tokens]), past_key_values=cache).logits
    return logits
