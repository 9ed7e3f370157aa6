"""What a forecast assumes of this runtime: how much of each rate it uses, and what a step costs besides bytes.

Those for the CPU were fitted to runs of ``moe-offload bench`` and are held to them by ``benchmarks/plan_check.py``;
those for CUDA are guesses, since the CUDA path has not run on a GPU.
"""

from typing import Literal

from moe_offload.offload.forecast.band import Band

Device = Literal["cpu", "cuda"]
# Of the rate at which memory is read: decoding codes costs arithmetic, and layers are short.
MEMORY_SHARE: dict[Device, Band] = {"cpu": Band(0.5, 0.68, 0.9), "cuda": Band(0.2, 0.35, 0.6)}
# Of the rate at which the disk is read at the size of an expert: queues run dry between layers.
DISK_SHARE = Band(0.78, 0.9, 1.0)
COPY_SHARE = Band(0.7, 0.85, 0.95)
# Of the shorter ways, what happens beside the longest: the rest waits for it or is waited for.
OVERLAP = Band(0.0, 0.45, 0.9)
# Python, routing and dispatch of a layer with experts, and of a token outside its layers.
LAYER_S: dict[Device, Band] = {"cpu": Band(0.00012, 0.0002, 0.00035), "cuda": Band(0.0003, 0.0006, 0.0012)}
TOKEN_S: dict[Device, Band] = {"cpu": Band(0.0005, 0.0012, 0.003), "cuda": Band(0.001, 0.002, 0.004)}
# Of the rate of large matrix products: weights are dequantised first, and rows are sorted by expert.
MATRIX_SHARE: dict[Device, Band] = {"cpu": Band(0.45, 0.62, 0.8), "cuda": Band(0.15, 0.3, 0.5)}
# Of the rate of a quantiser alone: reading, converting and writing are in between.
PACKING_SHARE = Band(0.5, 0.75, 1.0)
# Of the disk's rate of reading, in writing.
WRITE_SHARE = Band(0.2, 0.4, 0.8)
