"""The pack of a model: what the user has named, or what is made of it on first use."""

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig

from moe_offload.errors import ConfigError, PackCorruptError
from moe_offload.offload.pack.manifest import JOURNAL_NAME, is_pack
from moe_offload.offload.pack.outline import PackOutline
from moe_offload.offload.pack.packer import pack_model
from moe_offload.offload.progress import NULL_PROGRESS, ProgressSink

if TYPE_CHECKING:
    from moe_offload.offload.parallel.group import ExpertGroup


def find_pack(
    model: str | PathLike[str],
    group: "ExpertGroup | None" = None,
    *,
    pack_dir: str | PathLike[str] | None,
    format: str,
    dense_format: str,
    revision: str | None,
    token: str | None,
    progress: ProgressSink | None,
    check: Callable[[PackOutline], None],
) -> Path:
    """The folder of a pack, which may be half of one; a checkpoint is packed first.

    Of a group on one machine the first rank packs everything, for all; on several, each rank packs its own share.
    """
    try:
        folder = Path(model).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{str(model)!r}: {error}") from error
    if is_pack(folder) or (folder / JOURNAL_NAME).exists():  # half a pack is refused further down
        return folder

    def pack() -> Path:
        return pack_model(
            str(model),
            Path(pack_dir) if pack_dir is not None else None,
            format=format,
            dense_format=dense_format,
            revision=revision,
            token=token,
            share=None if group is None or group.place.is_one_machine else group.share,
            progress=progress or NULL_PROGRESS,
            check=check,
        )

    return group.in_turn(pack, str(model)) if group is not None and group.place.is_one_machine else pack()


def pack_config(folder: Path) -> Any:
    """The config of a pack's model, which is never quantised: its experts are in slots, its dense part is plain."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise PackCorruptError(f"{folder / 'config.json'} cannot be read: {error}") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config
