"""Run mixture-of-experts language models that do not fit in memory.

The public names are loaded on first use, so that ``import moe_offload`` (and ``moe-offload --help``) costs no torch.
"""

import os
from typing import TYPE_CHECKING, Any

from moe_offload._version import VERSION as __version__

if TYPE_CHECKING:
    from moe_offload.offload.model import OffloadedModel

# Large tensors on huge pages: making small ones takes longer than what packing does with them. torch looks at this when
# it is imported, so it has to be here; a user who imports torch first, or has set it, is left alone.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__all__ = ["OffloadedModel", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "OffloadedModel":
        from moe_offload.offload.model import OffloadedModel

        return OffloadedModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
