"""The network that corrects the recall of like tokens, and how it is fitted."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from moe_offload.cache.learned import LearnedWeights
from moe_offload.cache.recall import Floats
from moe_offload.offload.learning.examples import Examples

WIDTH = 48
EPOCHS = 40
PATIENCE = 5  # epochs without a better loss on what was kept apart
BATCH_TOKENS = 64
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05
DROPOUT = 0.3  # of the choices that the sums run over
_SEED = 0


class Network(nn.Module):
    """See `LearnedWeights`; experts of all layers in one table, the last row for none."""

    def __init__(self, num_experts: Sequence[int], top_k: int) -> None:
        super().__init__()
        self.num_layers, self.most_experts = len(num_experts), max(num_experts)
        rows = self.num_layers * self.most_experts + 1
        scale = 1 / math.sqrt(2 * self.num_layers * top_k)
        generator = torch.Generator().manual_seed(_SEED)
        self.now = nn.Parameter(torch.randn(rows, WIDTH, generator=generator) * scale)
        self.before = nn.Parameter(torch.randn(rows, WIDTH, generator=generator) * scale)
        self.now.data[-1] = self.before.data[-1] = 0
        self.start = nn.Parameter(torch.zeros(WIDTH))
        self.out = nn.Parameter(torch.zeros(self.num_layers, WIDTH, self.most_experts))
        self.bias = nn.Parameter(torch.full((self.num_layers, self.most_experts), -0.5))
        self.recall_scale = nn.Parameter(torch.ones(()))

    def rows(self, experts: torch.Tensor) -> torch.Tensor:
        """Where experts ``[T, L, K]`` are in the tables."""
        layers = torch.arange(self.num_layers)[:, None] * self.most_experts
        return torch.where(experts >= 0, layers + experts, self.num_layers * self.most_experts)

    def forward(self, now: torch.Tensor, before: torch.Tensor, recalled: torch.Tensor) -> torch.Tensor:
        """Logits ``[T, L, E]`` from rows ``[T, L, K]`` of this token and the one before, and scores ``[T, L, E]``."""
        of_now = F.embedding(now, self.now, padding_idx=-1).sum(2).cumsum(1)  # [T, L, W]: a layer knows those before it
        of_before = F.embedding(before, self.before, padding_idx=-1).sum((1, 2))[:, None]
        inputs = F.softsign(self.start + of_now + of_before)
        return self.recall_scale * recalled + torch.einsum("tlw,lwe->tle", inputs, self.out) + self.bias

    @torch.no_grad()
    def weights(self, num_experts: Sequence[int]) -> LearnedWeights:
        """What is added to the recalled scores as they are."""
        scale = float(self.recall_scale.clamp_min(0.05))

        def by_layer(table: torch.Tensor) -> tuple[Floats, ...]:
            layers = table[:-1].reshape(self.num_layers, self.most_experts, WIDTH)
            return tuple(layer[:n].numpy().copy() for layer, n in zip(layers, num_experts, strict=True))

        return LearnedWeights(
            self.start.numpy().copy(),
            by_layer(self.now),
            by_layer(self.before),
            tuple((out[:, :n] / scale).numpy().copy() for out, n in zip(self.out, num_experts, strict=True)),
            tuple((bias[:n] / scale).numpy().copy() for bias, n in zip(self.bias, num_experts, strict=True)),
        )


def fit(
    kept: Examples, apart: Examples, num_experts: Sequence[int], on_epoch: Callable[[int, float], None]
) -> LearnedWeights:
    """The network with the least loss on ``apart``; ``on_epoch`` is told every epoch's."""
    torch.manual_seed(_SEED)
    network = Network(num_experts, kept.experts.shape[2])
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS, LEARNING_RATE / 10)
    exists = torch.tensor([[e < n for e in range(max(num_experts))] for n in num_experts])
    learning, judging = _Batches(network, kept, exists), _Batches(network, apart, exists)
    best, best_loss, best_epoch = network.weights(num_experts), math.inf, 0
    for epoch in range(EPOCHS):
        network.train()
        for batch in torch.split(torch.randperm(kept.num_tokens), BATCH_TOKENS):
            optimizer.zero_grad()
            learning.loss(batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()
        network.eval()
        with torch.no_grad():
            parts = torch.split(torch.arange(apart.num_tokens), BATCH_TOKENS)
            loss = sum(float(judging.loss(part)) * len(part) for part in parts) / apart.num_tokens
        on_epoch(epoch + 1, loss)
        if loss < best_loss:
            best, best_loss, best_epoch = network.weights(num_experts), loss, epoch
        elif epoch - best_epoch >= PATIENCE:
            break
    return best


class _Batches:
    """Examples as tensors, and the loss of the network on some of them."""

    def __init__(self, network: Network, examples: Examples, exists: torch.Tensor) -> None:
        self._network, self._exists = network, exists
        self._rows = network.rows(torch.from_numpy(examples.experts))
        self._follows = torch.from_numpy(examples.follows)
        self._recalled, self._targets = torch.from_numpy(examples.recalled), torch.from_numpy(examples.targets)
        self._none = network.num_layers * network.most_experts

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """Cross entropy of those that may be evicted: who is used by the token itself may not."""
        now = self._rows[tokens]
        before = self._rows[tokens - 1].masked_fill(~self._follows[tokens, None, None], self._none)
        logits = self._network(self._drop(now), self._drop(before), self._recalled[tokens].float())
        is_judged = self._exists.repeat(len(tokens), 1, 1)
        in_use = torch.zeros(logits.shape[0], self._none + 1, dtype=torch.bool)
        in_use.scatter_(1, now.flatten(1), True)
        is_judged &= ~in_use[:, :-1].view(logits.shape)
        loss = F.binary_cross_entropy_with_logits(logits, self._targets[tokens].float(), reduction="none")
        return loss[is_judged].mean()

    def _drop(self, rows: torch.Tensor) -> torch.Tensor:
        if not self._network.training:
            return rows
        return rows.masked_fill(torch.rand(rows.shape) < DROPOUT, self._none)
