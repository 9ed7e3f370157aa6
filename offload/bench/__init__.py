"""Measuring how fast a model decodes under a budget, and how near that is to what the machine allows.

``run(synthetic_pack(Shape("mixtral-8x7b", layers=8)), cross(ram=["4GiB"]), Workload())`` is what ``moe-offload bench``
does.
"""

from moe_offload.offload.bench.compare import run, serve_runs
from moe_offload.offload.bench.packs import Shape, synthetic_pack
from moe_offload.offload.bench.report import BenchReport, Row, RunFigures
from moe_offload.offload.bench.settings import Setting, Workload, cross

__all__ = [
    "BenchReport",
    "Row",
    "RunFigures",
    "Setting",
    "Shape",
    "Workload",
    "cross",
    "run",
    "serve_runs",
    "synthetic_pack",
]
