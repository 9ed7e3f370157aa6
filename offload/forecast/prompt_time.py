"""How long a prompt takes to its first token: the formula, which docs/planning.md explains.

A prompt goes through in chunks. A chunk of ``n`` tokens touches ``E x (1 - (1 - k / E) ^ n)`` of a layer's ``E``
experts, or somewhat fewer; those without a slot are read once a chunk::

    compute = operations / (matrix rate x share) + chunks x step's compute
    disk    = sum over chunks and layers of touched x (1 - share of slots) x expert bytes / (disk rate x disk share)
    copy    = the same with the shares in VRAM, over PCIe                                     with a GPU
"""

from collections.abc import Mapping

from moe_offload.offload.forecast.band import Band, propagate
from moe_offload.offload.forecast.calibration import (
    COPY_SHARE,
    DISK_SHARE,
    LAYER_S,
    MATRIX_SHARE,
    MEMORY_SHARE,
    OVERLAP,
    TOKEN_S,
)
from moe_offload.offload.forecast.decode_time import side_by_side
from moe_offload.offload.forecast.machine import Machine
from moe_offload.offload.forecast.token_load import LayerLoad, TokenLoad

# Tokens of one text choose more alike than tokens at random: of those touched at random, what is touched.
_TOUCHED = Band(0.75, 0.9, 1.0)


def prompt_time(
    load: TokenLoad, machine: Machine, *, prompt_tokens: int, chunk_tokens: int, operations_per_token: float
) -> Band:
    """Seconds from a prompt of ``prompt_tokens`` to the first token."""
    full, rest = divmod(prompt_tokens, chunk_tokens)
    chunks = [chunk_tokens] * full + ([rest] if rest else [])
    touched_bytes = sum(_touched(layer, tokens) * layer.expert_bytes for tokens in chunks for layer in load.layers)
    missing = {
        "disk": sum(
            _touched(layer, tokens) * layer.expert_bytes * (1 - min(1.0, max(layer.share, layer.host_share)))
            for tokens in chunks
            for layer in load.layers
        ),
        "copy": sum(
            _touched(layer, tokens) * layer.expert_bytes * (1 - layer.share)
            for tokens in chunks
            for layer in load.layers
        ),
    }

    def seconds(value: Mapping[str, float]) -> float:
        memory_bytes = touched_bytes * value["touched"] + len(chunks) * (load.dense_bytes + load.kv_bytes)
        compute_s = (
            prompt_tokens * operations_per_token / (value["matrix"] * value["matrix share"])
            + memory_bytes / (value["memory"] * value["memory share"])
            + len(chunks) * (len(load.layers) * value["layer"] + value["token"])
        )
        ways_s = [compute_s, missing["disk"] * value["touched"] / (value["disk"] * value["disk share"])]
        if machine.copy is not None:
            ways_s.append(missing["copy"] * value["touched"] / (value["copy"] * value["copy share"]))
        return side_by_side(ways_s, value["overlap"])

    factors = {
        "touched": _TOUCHED,
        "matrix": machine.matrix.band,
        "matrix share": MATRIX_SHARE[machine.device],
        "memory": machine.memory.band,
        "memory share": MEMORY_SHARE[machine.device],
        "layer": LAYER_S[machine.device],
        "token": TOKEN_S[machine.device],
        "disk": machine.disk.band,
        "disk share": DISK_SHARE,
        "overlap": OVERLAP,
    }
    if machine.copy is not None:
        factors |= {"copy": machine.copy.band, "copy share": COPY_SHARE}
    return propagate(seconds, factors)


def _touched(layer: LayerLoad, tokens: int) -> float:
    """Experts of a layer that so many tokens ask for, choosing at random."""
    return layer.num_experts * (1 - (1 - layer.top_k / layer.num_experts) ** tokens)
