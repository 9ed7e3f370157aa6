"""Where packs are kept: ``MOE_OFFLOAD_HOME``, or the user's cache folder."""

import os
from pathlib import Path


def home_dir() -> Path:
    """The cache folder, absolute, not necessarily there yet.

    ``MOE_OFFLOAD_HOME`` decides; else ``moe-offload`` under ``XDG_CACHE_HOME``, which counts only if absolute
    (as its specification asks); else ``~/.cache/moe-offload``.
    """
    own = os.environ.get("MOE_OFFLOAD_HOME")
    if own:
        return Path(own).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    caches = Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache"
    return caches / "moe-offload"


def packs_dir() -> Path:
    """The folder that holds one folder for each pack."""
    return home_dir() / "packs"
