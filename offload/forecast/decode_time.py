"""How long a decode step takes: the formula, which docs/planning.md explains.

``step = longest + (1 - overlap) x (sum - longest)`` over the ways that run side by side::

    compute = memory bytes / (memory rate x memory share) + layers x layer time + token time
    disk    = expert bytes x (1 - reach) / (disk rate x disk share)
    copy    = expert bytes x (1 - hit ratio) / (PCIe rate x copy share)      with a GPU
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moe_offload.offload.forecast.band import Band, propagate
from moe_offload.offload.forecast.calibration import COPY_SHARE, DISK_SHARE, LAYER_S, MEMORY_SHARE, OVERLAP, TOKEN_S
from moe_offload.offload.forecast.machine import Machine
from moe_offload.offload.forecast.token_load import TokenLoad


@dataclass(frozen=True)
class DecodeTime:
    """Seconds of a step, and of each way alone at the best guess."""

    step_s: Band
    ways_s: Mapping[str, float]

    @property
    def tokens_per_s(self) -> Band:
        """The speed."""
        return self.step_s.inverse()

    @property
    def bound_by(self) -> str:
        """The way that takes longest: "memory", "disk" or "copy"."""
        return max(self.ways_s, key=self.ways_s.__getitem__)


def decode_time(load: TokenLoad, machine: Machine, hit_ratio: Band, reach: Band) -> DecodeTime:
    """The time of a step in which ``hit_ratio`` of the experts are in compute slots and ``reach`` in any memory."""

    def ways(value: Mapping[str, float]) -> dict[str, float]:
        # Both ratios come from the same routing, so they err together.
        found, reached = _at(hit_ratio, value["hits"]), _at(reach, value["hits"])
        transfers_s = transfer_s(value, load.expert_bytes * (1 - reached), load.expert_bytes * (1 - found))
        return {"memory": compute_s(value, load.memory_bytes, len(load.layers))} | transfers_s

    def step_s(value: Mapping[str, float]) -> float:
        return side_by_side(ways(value).values(), value["overlap"])

    factors = machine_factors(machine) | {"hits": Band(-1.0, 0.0, 1.0)}
    return DecodeTime(propagate(step_s, factors), ways({name: factor.mid for name, factor in factors.items()}))


def machine_factors(machine: Machine) -> dict[str, Band]:
    """What a machine and this runtime on it give to a time; without a GPU nothing is copied."""
    factors = {
        "memory": machine.memory.band,
        "memory share": MEMORY_SHARE[machine.device],
        "layer": LAYER_S[machine.device],
        "token": TOKEN_S[machine.device],
        "disk": machine.disk.band,
        "disk share": DISK_SHARE,
        "overlap": OVERLAP,
    }
    if machine.copy is not None:
        factors |= {"copy": machine.copy.band, "copy share": COPY_SHARE}
    return factors


def compute_s(value: Mapping[str, float], memory_bytes: float, num_layers: int, num_passes: int = 1) -> float:
    """Of so many passes, whose bytes are given together: reading memory, and what layers and passes cost besides."""
    read_s = memory_bytes / (value["memory"] * value["memory share"])
    return read_s + num_passes * (num_layers * value["layer"] + value["token"])


def transfer_s(value: Mapping[str, float], disk_bytes: float, copied_bytes: float) -> dict[str, float]:
    """Of bytes from the disk, and of bytes to a GPU where ``value`` has one."""
    spent_s = {"disk": disk_bytes / (value["disk"] * value["disk share"])}
    if "copy" in value:
        spent_s["copy"] = copied_bytes / (value["copy"] * value["copy share"])
    return spent_s


def side_by_side(seconds: Iterable[float], overlap: float) -> float:
    """The time of ways that run side by side, of which ``overlap`` of all but the longest is hidden behind it."""
    values = list(seconds)
    longest = max(values)
    return longest + (1 - overlap) * (sum(values) - longest)


def _at(band: Band, level: float) -> float:
    """The band's low, mid or high end, for -1, 0 and 1."""
    return band.mid + (band.high - band.mid if level > 0 else band.mid - band.low) * level
