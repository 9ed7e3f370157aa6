"""Weight formats and the kernels that compute with packed weights."""

from moe_offload.quant.base import ErrorBound, Format
from moe_offload.quant.formats import format_names, get_format
from moe_offload.quant.kernels import backend_name

__all__ = ["ErrorBound", "Format", "backend_name", "format_names", "get_format"]
