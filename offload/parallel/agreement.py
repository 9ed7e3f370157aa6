"""What ranks must have in common, and what is said if they have not."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
import xxhash

from moe_offload._version import VERSION
from moe_offload.errors import GroupMismatchError
from moe_offload.offload.pack.manifest import PackManifest
from moe_offload.quant import backend_name

Facts = dict[str, Any]

_REMEDIES = {
    "moe-offload": "install the same version on all machines",
    "torch": "install the same version on all machines",
    "transformers": "install the same version on all machines",
    "format of the experts": "pack them in the same format",
    "model": "give all ranks the same MODEL, packed from the same checkpoint",
}


def facts_of(manifest: PackManifest) -> Facts:
    """What this rank would run, and with what."""
    return {
        "moe-offload": VERSION,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "format of the experts": manifest.expert_format,
        "model": f"{manifest.source} ({_model_id(manifest)})",
        "model_id": _model_id(manifest),
        "kernels": backend_name(),
    }


def check_agreement(everyone: Sequence[Facts]) -> None:
    """`GroupMismatchError` names the first thing in which a rank differs from rank 0."""
    first = everyone[0]
    for rank, facts in enumerate(everyone):
        for what, remedy in _REMEDIES.items():
            key = "model_id" if what == "model" else what
            if facts.get(key) != first.get(key):
                raise GroupMismatchError(
                    f"the ranks do not fit together: {what} is {first.get(what)} at rank 0 and {facts.get(what)} at "
                    f"rank {rank}; {remedy}"
                )


def _model_id(manifest: PackManifest) -> str:
    """The checkpoint and how it was packed; the same for a whole pack and for shares of it."""
    layers = [(layer.module, layer.num_experts, layer.slot_bytes, layer.parts) for layer in manifest.layers]
    # A synthetic pack has no checkpoint: what it holds tells it apart from others as long as it is whole.
    origin = manifest.extra.get("fingerprint") or [layer.checksums for layer in manifest.layers if not layer.held]
    return xxhash.xxh3_64_hexdigest(repr((manifest.expert_format, layers, origin)).encode())
