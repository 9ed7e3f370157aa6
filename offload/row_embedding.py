"""An embedding table that stays in the pack: its rows are read when a token needs them.

A token reads one row of a table that may be a gigabyte, so the table is worth no memory that experts could have. What
was read lately is in the system's cache of files, which gives way to whatever needs the memory.
"""

import weakref
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from moe_offload.errors import PackCorruptError
from moe_offload.offload.checkpoint.shard_file import ShardFile
from moe_offload.offload.pack.manifest import REPACK

_EMBEDDING, _HEAD = "model.embed_tokens.", "lm_head.weight"
_TABLE = f"{_EMBEDDING}weight"


def table_in_pack(config: Any, names: Collection[str], device_type: str) -> str | None:
    """The dense tensor of a pack that is read by rows, or None: a table that is the head too is read whole anyway.

    The answer follows from the pack and the device, so a plan counts what a loader leaves out.
    """
    decoder = config.get_text_config(decoder=True)
    is_tied = getattr(config, "tie_word_embeddings", False) or getattr(decoder, "tie_word_embeddings", False)
    if device_type != "cpu" or config.is_encoder_decoder or is_tied or _HEAD not in names:
        return None
    # An embedding that holds more than its table does more than look up.
    of_embedding = [name for name in names if name.startswith(_EMBEDDING)]
    return _TABLE if of_embedding == [_TABLE] else None


class RowEmbedding(nn.Module):
    """Stands where an ``nn.Embedding`` stood; ``file`` is its own, and closed with it."""

    def __init__(self, embedding: nn.Embedding, file: ShardFile, key: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx = embedding.padding_idx
        if file.entries[key].shape != (self.num_embeddings, self.embedding_dim):
            raise PackCorruptError(
                f"{file.path} holds {key} of shape {list(file.entries[key].shape)}, the model needs "
                f"{[self.num_embeddings, self.embedding_dim]}; {REPACK}"
            )
        self._file, self._key = file, key
        file.expect_random_reads()
        weakref.finalize(self, file.close)
        # Follows the model when it is converted, as a weight would.
        self.register_buffer("like", torch.empty(0, dtype=dtype, device="cpu"), persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """The whole table, for modules that multiply with it themselves; read from the pack at every call."""
        like: Any = self.like
        return self._file.read(self._key).to(like.dtype)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """``[...]`` to ``[..., dim]``; each token's row is read once."""
        like: Any = self.like
        tokens = input_ids.reshape(-1).tolist()
        if len(tokens) == 1:
            rows = self._row(tokens[0])
        else:
            row_of = {token: self._row(token) for token in dict.fromkeys(tokens)}
            rows = torch.cat([row_of[token] for token in tokens]) if tokens else torch.empty(0, self.embedding_dim)
        return rows.to(like.dtype).view(*input_ids.shape, self.embedding_dim)

    def _row(self, token: int) -> torch.Tensor:
        if not 0 <= token < self.num_embeddings:
            raise IndexError(f"token {token} is not in a vocabulary of {self.num_embeddings}")
        return self._file.read(self._key, slice(token, token + 1))


def replace_embedding(model: nn.Module, key: str, file: ShardFile, dtype: torch.dtype) -> None:
    """Put a `RowEmbedding` on ``file`` in the place of the embedding whose weight is ``key``."""
    name = key.removesuffix(".weight")
    embedding = model.get_submodule(name)
    assert type(embedding) is nn.Embedding, f"{name} is a {type(embedding).__name__}, which may do more than look up"
    replacement = RowEmbedding(embedding, file, key, dtype)
    replacement._is_hf_initialized = True  # type: ignore[assignment]
    parent_name, _, child = name.rpartition(".")
    model.get_submodule(parent_name).register_module(child, replacement)
