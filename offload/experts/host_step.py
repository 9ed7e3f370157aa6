"""The experts of one step that the CPU computes from host memory, of a layer on another device."""

import time
from collections.abc import Sequence

import torch

from moe_offload.offload.experts.pair_outputs import ExpertFn
from moe_offload.offload.experts.weights import ExpertWeights, MlpParts
from moe_offload.offload.tiers.host_rows import RowsPool
from moe_offload.quant.moe_layer import MoeStep, PackedMlp, expert_outputs

# A step of more rows goes by copies. An expert of b bytes at 4.25 bits a weight takes 3.8 b flops a row: 19 to 3.8 ps a
# byte and row on a CPU of 0.2 to 1 Tflop/s. A link of 25 GB/s takes 40 ps a byte: it wins from 2 to 10 rows on.
MAX_ROWS = 8
_FIRST_ROW = torch.zeros(1, dtype=torch.long)


class HostStep:
    """Rows go to the host when this is made, outputs come back batch by batch, and then it is ended; sums are not made.

    ``answers`` has each computed expert with its outputs ``[rows that chose it, H]``, in fp32 on the device of ``x``.
    """

    def __init__(
        self, pool: RowsPool, x: torch.Tensor, top_k_index: torch.Tensor, expert_fn: ExpertFn, parts: MlpParts
    ) -> None:
        """``x [T, H]``, index ``[T, K]`` on the device; ``expert_fn`` must hold no tensors of that device."""
        self.answers: list[tuple[int, torch.Tensor]] = []
        self._pool, self._device, self._expert_fn, self._parts = pool, x.device, expert_fn, parts
        self._rows = pool.take()
        self._rows.fetch(x, top_k_index)

    @staticmethod
    def takes(num_rows: int) -> bool:
        """Whether a step of so many rows is worth computing on the CPU."""
        return num_rows <= MAX_ROWS

    @torch.no_grad()
    def compute(self, experts: Sequence[tuple[int, ExpertWeights]]) -> float:
        """Some of the experts, from weights in host memory, which nobody writes to meanwhile; each comes once.

        Returns the seconds that it took the CPU.
        """
        x, top_k_index = self._rows.rows()
        begin_s = time.perf_counter()
        tokens_of = [_tokens_of(expert_idx, top_k_index) for expert_idx, _ in experts]
        lengths = [len(tokens) for tokens in tokens_of]
        outputs = self._rows.outputs(sum(lengths))
        if not self._compute_together(x, [weights for _, weights in experts], outputs):
            for (_, weights), tokens, room in zip(experts, tokens_of, torch.split(outputs, lengths), strict=True):
                room.copy_(self._expert_fn(weights, x[tokens]))
        compute_s = time.perf_counter() - begin_s
        there = torch.split(self._rows.send(outputs, self._device), lengths)
        self.answers += [(expert_idx, rows) for (expert_idx, _), rows in zip(experts, there, strict=True)]
        return compute_s

    def end(self) -> None:
        """All that there was to compute has been, or the step has failed; ``answers`` stay."""
        self._pool.give_back(self._rows)

    def _compute_together(self, x: torch.Tensor, experts: Sequence[ExpertWeights], outputs: torch.Tensor) -> bool:
        """All of them in one call, for one token in a format that kernels know; whether that could be."""
        if len(x) != 1 or not MoeStep.takes(x):
            return False
        packed = [weights.packed_mlp(self._parts) for weights in experts]
        mlps = [mlp for mlp in packed if isinstance(mlp, PackedMlp)]
        if len(mlps) != len(experts):
            return False
        expert_outputs(self._parts.activation, x, mlps, outputs)
        return True


def _tokens_of(expert_idx: int, top_k_index: torch.Tensor) -> torch.Tensor:
    if len(top_k_index) == 1:
        return _FIRST_ROW
    return (top_k_index == expert_idx).any(1).nonzero().flatten()
