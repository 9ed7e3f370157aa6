"""How long a prompt takes to its first token: the formula, which docs/planning.md explains.

A prompt goes through in chunks. A chunk of ``n`` tokens touches ``E x (1 - (1 - k / E) ^ n)`` of a layer's ``E``
experts, or somewhat fewer; those without a slot are read once a chunk::

    compute = operations / (matrix rate x share) + chunks x step's compute
    disk    = sum over chunks and layers of touched x (1 - share of slots) x expert bytes / (disk rate x disk share)
    copy    = the same with the shares in VRAM, over PCIe                                     with a GPU
"""

from collections.abc import Mapping

from moe_offload.offload.forecast.band import Band, propagate
from moe_offload.offload.forecast.calibration import MATRIX_SHARE
from moe_offload.offload.forecast.decode_time import compute_s, machine_factors, side_by_side, transfer_s
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
    touched = [(layer, _touched(layer, tokens) * layer.expert_bytes) for tokens in chunks for layer in load.layers]
    touched_bytes = sum(num_bytes for _, num_bytes in touched)
    disk_bytes = sum(num_bytes * (1 - min(1.0, max(layer.share, layer.host_share))) for layer, num_bytes in touched)
    copied_bytes = sum(num_bytes * (1 - layer.share) for layer, num_bytes in touched)

    def seconds(value: Mapping[str, float]) -> float:
        memory_bytes = touched_bytes * value["touched"] + len(chunks) * (load.dense_bytes + load.kv_bytes)
        products_s = prompt_tokens * operations_per_token / (value["matrix"] * value["matrix share"])
        computing_s = products_s + compute_s(value, memory_bytes, len(load.layers), len(chunks))
        transfers_s = transfer_s(value, disk_bytes * value["touched"], copied_bytes * value["touched"])
        return side_by_side([computing_s, *transfers_s.values()], value["overlap"])

    factors = machine_factors(machine) | {
        "touched": _TOUCHED,
        "matrix": machine.matrix.band,
        "matrix share": MATRIX_SHARE[machine.device],
    }
    return propagate(seconds, factors)


def _touched(layer: LayerLoad, tokens: int) -> float:
    """Experts of a layer that so many tokens ask for, choosing at random."""
    return layer.num_experts * (1 - (1 - layer.top_k / layer.num_experts) ** tokens)
