"""A pack as one rank of a group sees it: the shape of what it holds, and whether it holds what it has to."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from moe_offload.errors import PackShareError
from moe_offload.offload.pack.manifest import LayerLayout, PackManifest
from moe_offload.offload.pack.share import Share


class _PackShape(Protocol):
    @property
    def layers(self) -> Sequence[LayerLayout]: ...
    @property
    def expert_format(self) -> str: ...
    @property
    def dense_bytes(self) -> int: ...


@dataclass(frozen=True)
class ShapeOfShare:
    """What a plan needs to know: ``num_experts`` of a layer are those of this rank."""

    layers: tuple[LayerLayout, ...]
    expert_format: str
    dense_bytes: int


def shape_of_share(pack: _PackShape, share: Share | None) -> _PackShape:
    """The pack itself without a share; `ConfigError` where a layer has fewer experts than there are ranks."""
    if share is None:
        return pack
    layers = tuple(
        LayerLayout(layer.module, len(share.held(layer.num_experts)), layer.slot_bytes, layer.parts)
        for layer in pack.layers
    )
    return ShapeOfShare(layers, pack.expert_format, pack.dense_bytes)


def check_share(manifest: PackManifest, share: Share | None, folder: Path) -> None:
    """`PackShareError` unless the pack is whole, or holds just what this rank has to."""
    for layer in manifest.layers:
        if layer.held is None or (share is not None and layer.held == share.held(layer.num_experts)):
            continue
        held = f"{folder} holds {_listed(layer.held)} of {layer.num_experts} experts of {layer.module}"
        if share is None:
            raise PackShareError(
                f"{held}: it is one rank's share; start all ranks with torchrun, or pack the checkpoint as a whole"
            )
        raise PackShareError(
            f"{held}; rank {share.rank} of {share.num_ranks} needs {_listed(share.held(layer.num_experts))}: start as "
            f"many ranks as it was packed for, each on its own share, or pack again with --share {share}"
        )


def _listed(expert_ids: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, expert_ids[:3]))
    return f"{len(expert_ids)} ({shown}{', ...' if len(expert_ids) > 3 else ''})"
