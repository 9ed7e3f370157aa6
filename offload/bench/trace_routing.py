"""Routing recorded from a real model: an ``.npz`` of arrays, made to fit the model that is measured."""

import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moe_offload.errors import ConfigError
from moe_offload.offload.bench.routing import Experts, Routing, Target


def load_trace(path: Path, target: Target, *, sequence: int | None = None) -> Routing:
    """The decode tokens of an ``.npz`` with ``experts`` int [tokens, layers, top_k], made to fit the target.

    ``phase`` (0 prefill, 1 decode), ``sequence`` and ``probs`` are used where there are such; -1 is an unknown expert,
    and its token is left out. The first layers and choices are taken, experts modulo the target's number.
    """
    arrays = _read(path)
    experts = arrays["experts"].astype(np.int64)
    num_layers, trace_top_k = experts.shape[1:]
    if trace_top_k < target.top_k:
        raise ConfigError(
            f"{path} has {trace_top_k} experts a token, the model {target.top_k}; use a pack with --top-k {trace_top_k}"
        )
    layers = np.arange(target.num_layers) % num_layers
    chosen = experts[:, layers, : target.top_k]
    wanted = (chosen >= 0).all(axis=(1, 2))
    if "phase" in arrays:
        wanted &= arrays["phase"] == 1
    if sequence is not None:
        if "sequence" not in arrays:
            raise ConfigError(f"{path} does not tell its sequences apart; leave out sequence=")
        wanted &= arrays["sequence"] == sequence
    tokens = np.flatnonzero(wanted)
    if not len(tokens):
        raise ConfigError(f"{path} has no decode tokens with all experts known" + _of_sequence(sequence))
    tokens = np.resize(tokens, target.num_tokens)
    probs = None
    if "probs" in arrays:
        probs = arrays["probs"].astype(np.float64)[tokens][:, layers, : target.top_k]
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


def _read(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files if name in ("experts", "phase", "sequence", "probs")}
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} is not an .npz file of arrays: {error}") from error
    experts = arrays.get("experts")
    if experts is None or experts.ndim != 3 or experts.dtype.kind not in "iu" or not experts.size:
        raise ConfigError(f"{path} has no array 'experts' of integers [tokens, layers, top_k]")
    for name in ("phase", "sequence"):
        if name in arrays and arrays[name].shape != experts.shape[:1]:
            raise ConfigError(f"{path}: {name!r} is {arrays[name].shape}, not one number for each of the tokens")
    if "probs" in arrays and arrays["probs"].shape != experts.shape:
        raise ConfigError(f"{path}: 'probs' is {arrays['probs'].shape}, not {experts.shape} as 'experts' is")
    return arrays


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
