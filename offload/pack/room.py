"""Whether a disk has room for a pack, asked before anything is downloaded or written."""

import os
from pathlib import Path

from moe_offload.errors import DiskFullError
from moe_offload.offload.pack.outline import PackOutline
from moe_offload.offload.pack.share import Share
from moe_offload.offload.planning.sizes import format_size


def free_bytes(folder: Path) -> int:
    """What may still be written to the disk that ``folder``, which need not be there yet, is or would be on."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    space = os.statvfs(folder)
    return space.f_bavail * space.f_frsize


def check_room(folder: Path, outline: PackOutline, share: Share | None = None) -> None:
    """Raise DiskFullError if what is still to be written does not fit, with plain dense weights in 16 bits."""
    num_held = [len(share.held(layer.num_experts)) if share else layer.num_experts for layer in outline.layers]
    whole_bytes = sum(held * layer.slot_bytes for held, layer in zip(num_held, outline.layers, strict=True))
    whole_bytes += outline.dense_bytes if share is None or share.rank == 0 else 0
    there_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    needed_bytes, room_bytes = whole_bytes - there_bytes, free_bytes(folder)
    if needed_bytes > room_bytes:
        raise DiskFullError(
            f"the pack needs {format_size(needed_bytes)} of disk, {folder.parent} has {format_size(room_bytes)} free; "
            "make room, choose another folder (--output, or MOE_OFFLOAD_HOME for all packs), or a format of fewer bits"
        )
