"""What a forward pass of a transformers model is given."""

from collections.abc import Mapping
from typing import Any

import torch

# A pass over more tokens of a sequence than drafts would bring is a prompt.
LONGEST_DRAFT_TOKENS = 16


def pass_tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The ids ``[B, S]`` or embeddings ``[B, S, H]`` that a pass reads; of a decoder, where its encoder is done."""
    names = ("input_ids", "inputs_embeds")
    if kwargs.get("encoder_outputs") is not None:  # the source has been read: only the decoder runs
        names, args = ("decoder_input_ids", "decoder_inputs_embeds"), ()
    tokens = next((kwargs[name] for name in names if kwargs.get(name) is not None), args[0] if args else None)
    return tokens if isinstance(tokens, torch.Tensor) else None
