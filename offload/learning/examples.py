"""What a predictor is fitted on: for every token and layer of traces, who is used again, and how soon."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_offload.cache import RoutingTrace, make_policy
from moe_offload.cache.recall import USED
from moe_offload.errors import ConfigError

DISCOUNT = 0.8  # what a use is worth, for every token that it is later
LEAST_TOKENS = 200
# Targets and scores are kept for each token, layer and expert, in 16 bits each.
MOST_NUMBERS = 1 << 25
_DECODE = 1
_NEVER_USED = -8.0


@dataclass(frozen=True, eq=False)
class Examples:
    """T tokens of L layers with up to E experts, K of them chosen; in order, texts one after the other."""

    experts: npt.NDArray[np.int64]  # [T, L, K], -1 none
    follows: npt.NDArray[np.bool_]  # [T]: on the token before, in the same text
    text: npt.NDArray[np.int64]  # [T]: from 0
    recalled: npt.NDArray[np.float16]  # [T, L, E]: scores of the policy that a network corrects
    targets: npt.NDArray[np.float16]  # [T, L, E]: DISCOUNT ** (tokens until the next use - 1), 0 if there is none

    @property
    def num_tokens(self) -> int:
        return len(self.text)


def decode_tokens(traces: Sequence[RoutingTrace], num_experts: Sequence[int]) -> list[RoutingTrace]:
    """The decode tokens of each trace; ConfigError where they are of another model, or too few in all."""
    found = []
    for trace in traces:
        if trace.num_layers != len(num_experts):
            raise ConfigError(f"a trace of {trace.num_layers} MoE layers for a model that has {len(num_experts)}")
        most = trace.experts.max(initial=-1, axis=(0, 2))
        told = trace.num_experts
        if (most >= num_experts).any() or (told is not None and told.tolist() != list(num_experts)):
            layer_idx = int(np.argmax(most >= num_experts)) if told is None else int(np.argmax(told != num_experts))
            raise ConfigError(
                f"a trace with {int(most[layer_idx]) + 1 if told is None else int(told[layer_idx])} experts in layer "
                f"{layer_idx}, where the model has {num_experts[layer_idx]}: it is of another model"
            )
        found.append(select(trace, np.ones(trace.num_tokens, np.bool_) if trace.phase is None else trace.phase == 1))
    num_tokens = sum(trace.num_tokens for trace in found)
    if num_tokens < LEAST_TOKENS:
        raise ConfigError(
            f"{num_tokens} decode tokens are too few to learn from, {LEAST_TOKENS} the least: record more with --trace"
        )
    return found


def select(trace: RoutingTrace, wanted: npt.NDArray[np.bool_]) -> RoutingTrace:
    """Only these tokens, and of each only what it chose."""
    num_tokens = int(wanted.sum())
    sequence = np.zeros(num_tokens, np.int32) if trace.sequence is None else trace.sequence[wanted]
    return RoutingTrace(
        experts=np.ascontiguousarray(trace.experts[wanted]),
        sequence=sequence,
        phase=np.full(num_tokens, _DECODE, np.uint8),
        num_experts=trace.num_experts,
    )


def split(traces: Sequence[RoutingTrace], share: float) -> tuple[list[RoutingTrace], list[RoutingTrace]]:
    """The last ``share`` of all tokens apart, by whole texts if there are several."""
    kept, apart = [], []
    for trace in traces:
        begin = round(trace.num_tokens * (1 - share))
        assert trace.sequence is not None
        starts = np.flatnonzero(np.diff(trace.sequence) != 0) + 1
        if len(starts):
            begin = int(starts[np.argmin(np.abs(starts - begin))])
        is_kept = np.arange(trace.num_tokens) < begin
        kept.append(select(trace, is_kept))
        apart.append(select(trace, ~is_kept))
    return kept, apart


def examples_of(traces: Sequence[RoutingTrace], num_experts: Sequence[int]) -> Examples:
    """Of all tokens; of too many to keep, of the last."""
    most_experts = max(num_experts)
    most_tokens = MOST_NUMBERS // (len(num_experts) * most_experts)
    parts: list[Examples] = []
    num_texts = 0
    for trace in reversed(traces):
        left = most_tokens - sum(part.num_tokens for part in parts)
        if left > 0 and trace.num_tokens:
            trace = select(trace, np.arange(trace.num_tokens) >= trace.num_tokens - left)
            parts.insert(0, _of_trace(trace, num_experts, num_texts))
            num_texts = int(parts[0].text[-1]) + 1

    def joined(name: str) -> npt.NDArray[Any]:
        return np.concatenate([getattr(part, name) for part in parts])

    return Examples(*(joined(name) for name in ("experts", "follows", "text", "recalled", "targets")))


def _of_trace(trace: RoutingTrace, num_experts: Sequence[int], first_text: int) -> Examples:
    experts = trace.experts.astype(np.int64)
    num_tokens, num_layers, _ = experts.shape
    assert trace.sequence is not None
    follows = np.concatenate([[False], np.diff(trace.sequence) == 0])
    recalled = np.full((num_tokens, num_layers, max(num_experts)), _NEVER_USED, np.float16)
    policy = make_policy("recall", num_experts)
    for token, layer_idx, chosen in _events(trace):
        if layer_idx == 0 and not follows[token]:
            policy.new_sequence()
        policy.touch(layer_idx, chosen, None)
        scores = np.array(policy.scores(layer_idx))
        recalled[token, layer_idx, : len(scores)] = np.where(scores > 0, scores - USED, _NEVER_USED)
    targets = np.zeros(recalled.shape, np.float16)
    upcoming = np.zeros(recalled.shape[1:], np.float32)
    layers = np.arange(num_layers)[:, None]
    for token in reversed(range(num_tokens)):
        targets[token] = upcoming
        upcoming *= DISCOUNT
        known = experts[token] >= 0
        upcoming[np.broadcast_to(layers, known.shape)[known], experts[token][known]] = 1
    return Examples(experts, follows, np.cumsum(~follows) - 1 + first_text, recalled, targets)


def _events(trace: RoutingTrace) -> Iterator[tuple[int, int, list[int]]]:
    for token, by_layer in enumerate(trace.experts.tolist()):
        for layer_idx, chosen in enumerate(by_layer):
            yield token, layer_idx, [expert_idx for expert_idx in chosen if expert_idx >= 0]
