"""What is to be measured: the workload, and the settings that are compared on it."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from moe_offload.cache import DEFAULT_POLICY
from moe_offload.errors import ConfigError

Kind = Literal["decode", "prefill"]
MODEL_ROUTING = "model"
DISK_S = 1.0


@dataclass(frozen=True)
class Setting:
    """One line of the result: a budget, as an amount or as the share of the experts that is to be resident."""

    ram: str | int | None = None
    resident: float | None = None
    policy: str = DEFAULT_POLICY
    prefetch: str | int = "auto"

    def __post_init__(self) -> None:
        if (self.ram is None) == (self.resident is None):
            raise ConfigError("a setting needs a budget: an amount of RAM or a share of the experts, not both")
        if self.resident is not None and not 0 < self.resident <= 1:
            raise ConfigError(f"a share of {self.resident:.0%} of the experts cannot be resident; use 1% to 100%")


@dataclass(frozen=True)
class Workload:
    """What a run does: ``prompt_tokens`` random tokens are read, then ``new_tokens`` are decoded and timed.

    ``warmup_tokens`` decoded before them fill the cache and are not counted. ``recall``: how much of a forced routing
    lookahead foresees (see `forced_routing`). ``kind="prefill"`` times the prompt alone, after one to warm up.
    """

    kind: Kind = "decode"
    prompt_tokens: int = 32
    new_tokens: int = 64
    warmup_tokens: int = 32
    routing: str = MODEL_ROUTING
    recall: float = 0.8
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be 1 or more")
        if self.warmup_tokens < 0:
            raise ConfigError(f"warmup_tokens is {self.warmup_tokens}; it must be 0 or more")
        if not 0 <= self.recall <= 1:
            raise ConfigError(f"recall is {self.recall}; it must be from 0 to 1")

    @property
    def context_tokens(self) -> int:
        """The longest text of a run."""
        decoded_tokens = 1 if self.kind == "prefill" else 1 + self.warmup_tokens + self.new_tokens
        return self.prompt_tokens + decoded_tokens


@dataclass(frozen=True)
class Job:
    """One run of one setting on one pack; what a process of its own is told.

    ``trace``: the file to record to. ``disk_s``: how long the disk's rate is measured, before the run and after it.
    """

    pack: str
    setting: Setting
    workload: Workload
    repeat: int = 0
    trace: str | None = None
    disk_s: float = DISK_S

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Job":
        """The inverse of `to_dict`."""
        setting, workload = Setting(**values["setting"]), Workload(**values["workload"])
        return cls(values["pack"], setting, workload, values["repeat"], values["trace"], values["disk_s"])


def cross(
    *,
    ram: Sequence[str | int] = (),
    resident: Sequence[float] = (),
    policies: Sequence[str] = (DEFAULT_POLICY,),
    prefetch: Sequence[str | int] = ("auto",),
) -> list[Setting]:
    """Every budget with every policy and every prefetch setting."""
    budgets: list[dict[str, Any]] = [*({"ram": amount} for amount in ram), *({"resident": share} for share in resident)]
    return [
        Setting(**budget, policy=policy, prefetch=depth)
        for budget, policy, depth in itertools.product(budgets, policies, prefetch)
    ]
