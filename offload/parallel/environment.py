"""Where this process stands in a group, from the variables that torchrun sets; imports no torch."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from moe_offload.errors import ConfigError

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
DEFAULT_SILENCE_S = 10.0


@dataclass(frozen=True)
class Place:
    """This process among ``num_ranks``; ``local_rank`` counts those on this machine, of which there are ``num_local``.

    ``silence_s``: a rank that gives no sign of life for so long is taken for lost.
    """

    rank: int
    num_ranks: int
    local_rank: int
    num_local: int
    host: str
    port: int
    silence_s: float = DEFAULT_SILENCE_S

    @property
    def is_one_machine(self) -> bool:
        """Whether all ranks are on this machine."""
        return self.num_local == self.num_ranks

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Place":
        """`ConfigError` where a variable is missing or makes no sense."""
        if missing := [name for name in _NEEDED if name not in environment]:
            raise ConfigError(
                f"{', '.join(missing)} not set: start the ranks with torchrun, such as "
                "torchrun --nproc-per-node 2 -m moe_offload chat MODEL"
            )
        rank, num_ranks, port = (_number(environment, name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        # Without torchrun, every rank is taken to have a machine of its own.
        local_rank, num_local = _number(environment, "LOCAL_RANK", 0), _number(environment, "LOCAL_WORLD_SIZE", 1)
        if not (0 <= rank < num_ranks and 0 <= local_rank < num_local <= num_ranks):
            raise ConfigError(
                f"RANK={rank} of WORLD_SIZE={num_ranks}, LOCAL_RANK={local_rank} of LOCAL_WORLD_SIZE={num_local}: "
                "these do not fit together; start the ranks with torchrun"
            )
        try:
            silence_s = float(environment.get("MOE_OFFLOAD_PEER_TIMEOUT", DEFAULT_SILENCE_S))
        except ValueError as error:
            raise ConfigError(f"MOE_OFFLOAD_PEER_TIMEOUT is no number of seconds: {error}") from error
        return cls(rank, num_ranks, local_rank, num_local, environment["MASTER_ADDR"], port, silence_s)


def in_a_group(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process was started as one of several."""
    return all(name in environment for name in _NEEDED) and environment["WORLD_SIZE"] != "1"


def serves_experts(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether it is one that holds experts for rank 0, which runs the model and has the terminal."""
    return in_a_group(environment) and environment["RANK"] != "0"


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError as error:
        raise ConfigError(f"{name}={text} is no number; start the ranks with torchrun") from error
