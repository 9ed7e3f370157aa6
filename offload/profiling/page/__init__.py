"""The report as one HTML page: nothing is fetched, and it is whole without JavaScript."""

from moe_offload.offload.profiling.page.render import render

__all__ = ["render"]
