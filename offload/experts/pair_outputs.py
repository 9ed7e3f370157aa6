"""The outputs of experts on many rows: where each goes, whoever computes it."""

from collections.abc import Callable, Iterable, Mapping

import torch

from moe_offload.offload.experts.weights import ExpertWeights, MlpParts

ExpertFn = Callable[[ExpertWeights, torch.Tensor], torch.Tensor]
"""One expert's MLP: its weights and rows ``[rows, in]`` to ``[rows, out]``."""


class PairOutputs:
    """Outputs of pairs, in a buffer that is made when the first one tells its width and dtype."""

    def __init__(self, num_pairs: int, is_partial: bool) -> None:
        """``is_partial``: some pairs stand for no expert, and are zero."""
        self._num_pairs, self._is_partial = num_pairs, is_partial
        self.rows: torch.Tensor | None = None

    def room(self, like: torch.Tensor) -> torch.Tensor:
        """All rows, of the width and dtype of ``like``."""
        if self.rows is None:
            shape = (self._num_pairs, like.shape[-1])
            self.rows = like.new_zeros(shape) if self._is_partial else like.new_empty(shape)
        return self.rows


def compute_pairs(
    x: torch.Tensor,
    rows_of: Mapping[int, torch.Tensor],
    pairs_of: Mapping[int, torch.Tensor],
    outputs: PairOutputs,
    expert_fn: ExpertFn,
    parts: MlpParts | None,
    expert_idx: int,
    weights: ExpertWeights,
) -> None:
    """One expert on its rows of ``x``, into the places of its pairs."""
    rows, pairs = rows_of[expert_idx], pairs_of[expert_idx]
    mlp = None if parts is None else weights.packed_mlp(parts)
    if parts is not None and mlp is not None and mlp.takes_rows(x, len(rows)):
        mlp.compute_rows(parts.activation, x, rows, outputs.room(x), pairs)
        return
    result = expert_fn(weights, x[rows])
    outputs.room(result)[pairs] = result


def stretches(pieces: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The rows that pieces take up, laid one after the other."""
    lengths = [len(piece) for piece in pieces]
    return list(torch.split(torch.arange(sum(lengths)), lengths))
