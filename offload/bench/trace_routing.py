"""Routing recorded from a real model: an ``.npz`` of arrays, made to fit the model that is measured."""

from pathlib import Path

import numpy as np

from moe_offload.cache import read_trace
from moe_offload.errors import ConfigError
from moe_offload.offload.bench.routing import Experts, Routing, Target


def load_trace(path: Path, target: Target, *, sequence: int | None = None) -> Routing:
    """The decode tokens of an ``.npz`` with ``experts`` int [tokens, layers, top_k], made to fit the target.

    ``phase`` (0 prefill, 1 decode), ``sequence`` and ``probs`` are used where there are such; -1 is an unknown expert,
    and its token is left out. The first layers and choices are taken, experts modulo the target's number.
    """
    trace = read_trace(path)
    if not trace.experts.size:
        raise ConfigError(f"{path} has no tokens")
    num_layers, trace_top_k = trace.num_layers, trace.top_k
    if trace_top_k < target.top_k:
        raise ConfigError(
            f"{path} has {trace_top_k} experts a token, the model {target.top_k}; use a pack with --top-k {trace_top_k}"
        )
    layers = np.arange(target.num_layers) % num_layers
    chosen = trace.experts[:, layers, : target.top_k].astype(np.int64)
    wanted = (chosen >= 0).all(axis=(1, 2))
    if trace.phase is not None:
        wanted &= trace.phase == 1
    if sequence is not None:
        if trace.sequence is None:
            raise ConfigError(f"{path} does not tell its sequences apart; leave out sequence=")
        wanted &= trace.sequence == sequence
    tokens = np.flatnonzero(wanted)
    if not len(tokens):
        raise ConfigError(f"{path} has no decode tokens with all experts known" + _of_sequence(sequence))
    tokens = np.resize(tokens, target.num_tokens)
    probs = None
    if trace.probs is not None:
        probs = trace.probs[tokens][:, layers, : target.top_k].astype(np.float64)
    notes = [f"trace {path.stem}" + _of_sequence(sequence)]
    if wanted.sum() < target.num_tokens:
        notes.append(f"its {wanted.sum()} tokens again and again")
    if num_layers != target.num_layers:
        notes.append(f"layers modulo {num_layers}" if num_layers < target.num_layers else "its first layers")
    if trace_top_k > target.top_k:
        notes.append(f"its first {target.top_k} of {trace_top_k} choices")
    fitted = chosen[tokens]
    if fitted.max() >= target.num_experts:
        notes.append(f"experts modulo {target.num_experts}")
        fitted = _folded(fitted, target.num_experts)
    return Routing(fitted, probs, ", ".join(notes))


def _of_sequence(sequence: int | None) -> str:
    return "" if sequence is None else f", sequence {sequence}"


def _folded(experts: Experts, num_experts: int) -> Experts:
    """Modulo ``num_experts``; what then comes twice in a row is moved to the next expert that does not."""
    folded = experts % num_experts
    for row in folded.reshape(-1, folded.shape[-1]):
        taken: set[int] = set()
        for rank, expert_idx in enumerate(row.tolist()):
            while expert_idx in taken:
                expert_idx = (expert_idx + 1) % num_experts
            taken.add(expert_idx)
            row[rank] = expert_idx
    return folded
