"""A trace that no model made: routing that repeats, a cache that forgets, and times that follow from both."""

from collections import OrderedDict
from typing import Any

import numpy as np

from moe_offload.cache.trace import Outcome, RoutingTrace, TransferKind

EXPERT_BYTES = 1_769_472
READ_US, DENSE_US, ROUTER_US, EXPERT_US, HEAD_US = 700, 180, 20, 90, 900


def synthetic_trace(
    num_layers: int = 6,
    num_experts: int = 8,
    top_k: int = 2,
    prompt_tokens: tuple[int, ...] = (20, 12, 30),
    new_tokens: int = 20,
    num_slots: int = 5,
    seed: int = 1,
) -> RoutingTrace:
    """A run with everything in it: every sequence is a prompt in one step, then one step per token."""
    return _Run(num_layers, num_experts, top_k, num_slots, seed).trace(prompt_tokens, new_tokens)


class _Run:
    def __init__(self, num_layers: int, num_experts: int, top_k: int, num_slots: int, seed: int) -> None:
        self.num_layers, self.num_experts, self.top_k, self.num_slots = num_layers, num_experts, top_k, num_slots
        self.draw = np.random.default_rng(seed)
        self.popularity = self.draw.dirichlet(np.full(num_experts, 0.7), num_layers)
        self.slots: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(num_layers)]
        self.now_us = 1_000_000
        self.rows: dict[str, list[Any]] = {name: [] for name in ("experts", "outcome", "predicted", "sequence", "step")}
        self.steps: dict[str, list[Any]] = {name: [] for name in ("begin", "us", "tokens", "layer_us", "decode")}
        self.transfers: list[tuple[int, int, int, int, int, TransferKind]] = []

    def trace(self, prompts: tuple[int, ...], new_tokens: int) -> RoutingTrace:
        for sequence, prompt_tokens in enumerate(prompts):
            last = self._step(sequence, self._choose(prompt_tokens, None), decode=False)
            for _ in range(new_tokens):
                last = self._step(sequence, self._choose(1, last), decode=True)
            self.now_us += 5_000  # nobody generates
        columns = np.array(self.transfers, np.int64).reshape(-1, 6).T
        decode = np.array(self.steps["decode"])
        return RoutingTrace(
            experts=np.concatenate(self.rows["experts"]).astype(np.int16),
            sequence=np.concatenate(self.rows["sequence"]),
            phase=np.repeat(decode, self.steps["tokens"]).astype(np.uint8),
            outcome=np.concatenate(self.rows["outcome"]).astype(np.uint8),
            predicted=np.concatenate(self.rows["predicted"]).astype(np.int16),
            distance=np.array([1, 2]),
            num_experts=np.full(self.num_layers, self.num_experts),
            num_slots=np.full(self.num_layers, self.num_slots),
            expert_bytes=np.full(self.num_layers, EXPERT_BYTES),
            step=np.concatenate(self.rows["step"]),
            step_begin_us=np.array(self.steps["begin"]),
            step_us=np.array(self.steps["us"]),
            step_tokens=np.array(self.steps["tokens"]),
            layer_us=np.array(self.steps["layer_us"]),
            **{f"transfer_{name}": column for name, column in zip(
                ("layer", "expert", "begin_us", "end_us", "bytes", "kind"), columns, strict=True)},
            meta=META | {"sequence_names": ["English", "code", "maths"][: len(prompts)]},
        )  # fmt: skip

    def _choose(self, tokens: int, last: Any) -> Any:
        """Experts [tokens, layers, top_k]; of every expert of the last token, half the time the same again."""
        noise = self.draw.gumbel(size=(tokens, self.num_layers, self.num_experts))
        scores = np.log(self.popularity + 1e-3) + noise
        for token in range(tokens):
            before = last[0] if token == 0 and last is not None else np.argsort(-scores[token - 1], -1)[:, : self.top_k]
            if token or last is not None:
                np.put_along_axis(scores[token], before, np.take_along_axis(scores[token], before, -1) + 1.2, -1)
        return np.argsort(-scores, -1)[..., : self.top_k]

    def _step(self, sequence: int, chosen: Any, *, decode: bool) -> Any:
        tokens, begin_us = len(chosen), self.now_us
        step = len(self.steps["us"])
        outcome = np.zeros(chosen.shape, np.uint8)
        predicted = np.full((tokens, self.num_layers, 2, self.top_k), -1)
        times = []
        for layer in range(self.num_layers):
            self.now_us += DENSE_US * (1 if decode else 8) + ROUTER_US
            if decode:
                predicted[0, layer] = self._predict(layer, chosen[0, layer])
            missed, late = self._ask(layer, chosen[:, layer], outcome[:, layer], predicted[:, layer, 0].ravel())
            wait_us = READ_US * missed + READ_US // 3 * late
            expert_us = EXPERT_US * chosen.shape[0] * self.top_k
            self.now_us += wait_us + expert_us
            times.append((DENSE_US * (1 if decode else 8), ROUTER_US, wait_us, expert_us))
        self.now_us += HEAD_US
        for name, value in (("experts", chosen), ("outcome", outcome), ("predicted", predicted)):
            self.rows[name].append(value)
        self.rows["sequence"].append(np.full(tokens, sequence))
        self.rows["step"].append(np.full(tokens, step))
        for name, value in (("begin", begin_us), ("us", self.now_us - begin_us), ("tokens", tokens),
                            ("layer_us", times), ("decode", decode)):  # fmt: skip
            self.steps[name].append(value)
        return chosen[-1:]

    def _predict(self, layer: int, chosen: Any) -> Any:
        """By distance: nothing from before the first layer, else each expert with a chance of 0.8 and 0.6."""
        guesses = np.full((2, self.top_k), -1)
        for index, recall in enumerate((0.8, 0.6)):
            if layer > index:
                others = np.setdiff1d(np.arange(self.num_experts), chosen)
                wrong = self.draw.permutation(others)[: self.top_k]
                right = self.draw.random(self.top_k) < recall
                guesses[index] = np.where(right, chosen, np.resize(wrong, self.top_k))
        return guesses

    def _ask(self, layer: int, chosen: Any, outcome: Any, guesses: Any) -> tuple[int, int]:
        """Misses and late ones of a layer; fills ``outcome``, moves the slots along."""
        slots, missed, late, found = self.slots[layer], 0, 0, {}
        for expert in np.unique(chosen).tolist():
            if expert in slots:
                found[expert] = Outcome.RESIDENT
            elif expert in guesses:
                found[expert] = Outcome.LATE if self.draw.random() < 0.25 else Outcome.PREFETCHED
                late += found[expert] == Outcome.LATE
                self._read(layer, expert, self.now_us - READ_US, TransferKind.USED)
            else:
                found[expert] = Outcome.MISSED
                self._read(layer, expert, self.now_us + READ_US * missed, TransferKind.DEMAND)
                missed += 1
            slots[expert] = None
            slots.move_to_end(expert)
        while len(slots) > self.num_slots:
            slots.popitem(last=False)
        for expert in np.unique(guesses).tolist():
            if expert >= 0 and expert not in found and expert not in slots:
                self._read(layer, expert, self.now_us - READ_US, TransferKind.WASTED)
        outcome[:] = np.vectorize(found.__getitem__, otypes=[np.uint8])(chosen)
        return missed, late

    def _read(self, layer: int, expert: int, begin_us: int, kind: TransferKind) -> None:
        self.transfers.append((layer, expert, begin_us, begin_us + READ_US, EXPERT_BYTES, kind))


META: dict[str, Any] = {
    "model": "example/mixture-6x8",
    "recorded_at": "2026-01-02T03:04:05Z",
    "format": "nf4",
    "dense_format": "source",
    "device": "cpu",
    "policy": "decay",
    "prefetch": "auto",
    "ram_bytes": 256 * 1024**2,
    "context_tokens": 4096,
    "dense_bytes_per_token": 12_000_000,
    "kv_bytes_per_token": 200_000,
    "rates": {"memory_bytes_per_s": 18e9, "disk_bytes_per_s": 2.4e9, "direct": True},
    "machine": {"cpu": "An Example CPU @ 3 GHz", "cores": 8, "threads": 8, "kernels": "avx2"},
    "versions": {"moe_offload": "0.1.0", "torch": "2.11.0"},
}
