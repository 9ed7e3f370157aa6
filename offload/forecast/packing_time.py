"""How long it takes to make a pack: reading, quantising and writing, which overlap in part."""

from collections.abc import Mapping

from moe_offload.offload.forecast.band import Band, propagate
from moe_offload.offload.forecast.calibration import OVERLAP, PACKING_SHARE, WRITE_SHARE
from moe_offload.offload.forecast.decode_time import side_by_side
from moe_offload.offload.forecast.machine import Machine


def packing_time(machine: Machine, *, source_bytes: int, num_weights: int, pack_bytes: int) -> Band:
    """Seconds from the checkpoint on the disk to the pack on the same disk; a download is not in it."""

    def seconds(value: Mapping[str, float]) -> float:
        ways_s = (
            source_bytes / value["disk"],
            num_weights / (value["quantize"] * value["packing share"]),
            pack_bytes / (value["disk"] * value["write share"]),
        )
        return side_by_side(ways_s, value["overlap"])

    return propagate(
        seconds,
        {
            "disk": machine.disk.band,
            "quantize": machine.quantize.band,
            "packing share": PACKING_SHARE,
            "write share": WRITE_SHARE,
            "overlap": OVERLAP,
        },
    )
