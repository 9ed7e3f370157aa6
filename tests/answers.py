"""The logits of an answer, as the generator asks a model for them."""

from typing import Any

import torch

from moe_offload import OffloadedModel

PROMPT = torch.randint(3, 120, (1, 11), generator=torch.Generator().manual_seed(1))
NEW_TOKENS = 18


def answer(model: OffloadedModel) -> torch.Tensor:
    """Of every token ``[NEW_TOKENS, vocabulary]``, which are given."""
    rows: list[torch.Tensor] = []

    def watch(module: Any, args: Any, output: Any) -> None:
        rows.append(output.logits[0, -1].clone())

    hook = model.model.register_forward_hook(watch)
    token_ids = torch.randint(3, 120, (NEW_TOKENS,), generator=torch.Generator().manual_seed(2)).tolist()
    model._generator.replay(PROMPT, token_ids, lambda num_tokens: None)
    hook.remove()
    assert len(rows) >= NEW_TOKENS  # a prompt in pieces is several passes
    return torch.stack(rows[-NEW_TOKENS:])
