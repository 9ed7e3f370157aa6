"""What was measured, as objects and as JSON.

`BenchReport.to_dict` is the JSON of ``moe-offload bench --json``, sizes in bytes, times in seconds, rates a second::

    {"schema": 1,
     "machine": {"cpu", "cores", "threads", "kernels", "torch", "moe_offload"},
     "pack": {"name", "folder", "format", "dense_format", "layers", "experts", "top_k", "expert_bytes",
              "all_expert_bytes", "dense_bytes"},
     "workload": {"kind", "prompt_tokens", "new_tokens", "warmup_tokens", "routing", "recall", "threads", "seed"},
     "rates": {"memory_bytes_per_s", "disk_bytes_per_s", "direct", "matrix_ops_per_s"},
     "rows": [{"setting": {"ram", "resident", "policy", "prefetch"},
               "best_tokens_per_s", "median_tokens_per_s", "bound_tokens_per_s", "bound_share", "bound_by",
               "best": run, "runs": [run, ...]}]}

``best`` is the fastest of ``runs``; the bound is of its counts and the best rates measured beside any run.
``bound_by`` is "disk", "memory" or "compute". A run::

    {"routing", "ram_bytes", "resident_share", "load_s", "peak_bytes", "time_to_first_token_s", "tokens", "elapsed_s",
     "tokens_per_s", "median_step_s", "hit_ratio", "bytes_read", "bytes_read_per_token", "bytes_missed",
     "bytes_missed_per_token", "stall_s", "stall_share", "prefetch_recall", "prefetch_issued", "prefetch_wasted",
     "expert_bytes_per_token", "dense_bytes_per_token", "kv_bytes_per_token", "operations", "rates", "num_ranks",
     "peer_wait_s", "peer_bytes"}

``bytes_missed`` are those that had to be read, at once or ahead of time: all that were read (``bytes_read``) but for
what was prefetched in vain. ``routing`` says in words where the choice of experts came from, and
``peak_bytes`` is the most memory that the process held beyond its imports. In a prefill the tokens are the prompt's,
``elapsed_s`` is the time to the first token, and ``operations`` counts multiplications and additions; else it is null.
Where several ranks share the experts, counts are of all, times and budgets are rank 0's, and the bound is that of one
machine; ``peer_bytes`` is what rank 0 sent and received, ``peer_wait_s`` the time in which it waited for the others.
"""

import statistics
from dataclasses import asdict, dataclass
from functools import reduce
from typing import Any

from moe_offload.offload.bench.settings import Kind, Setting, Workload
from moe_offload.offload.planning.bound import Bound, bound_of

SCHEMA = 1


@dataclass(frozen=True)
class MachineRates:
    """Bytes and operations a second; None where it was not measured. ``direct``: the disk was read past the cache."""

    memory_bytes_per_s: float
    disk_bytes_per_s: float
    direct: bool
    matrix_ops_per_s: float | None = None

    def best(self, other: "MachineRates") -> "MachineRates":
        """The faster of both in everything: others only take from a machine, they never lend it speed."""
        matrix = [rate for rate in (self.matrix_ops_per_s, other.matrix_ops_per_s) if rate is not None]
        return MachineRates(
            max(self.memory_bytes_per_s, other.memory_bytes_per_s),
            max(self.disk_bytes_per_s, other.disk_bytes_per_s),
            self.direct and other.direct,
            max(matrix, default=None),
        )


@dataclass(frozen=True)
class RunFigures:
    """One run of one setting; see the module for the units."""

    routing: str
    ram_bytes: int
    resident_share: float
    load_s: float
    peak_bytes: int | None
    time_to_first_token_s: float
    tokens: int
    elapsed_s: float
    median_step_s: float | None
    hit_ratio: float
    bytes_read: int
    bytes_missed: int
    stall_s: float
    prefetch_recall: float
    prefetch_issued: int
    prefetch_wasted: int
    expert_bytes_per_token: int
    dense_bytes_per_token: int
    kv_bytes_per_token: int
    operations: int | None
    rates: MachineRates
    num_ranks: int = 1
    peer_wait_s: float = 0.0
    peer_bytes: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Speed of what was timed."""
        return self.tokens / self.elapsed_s

    @property
    def bytes_read_per_token(self) -> float:
        """Bytes from the disk for one token."""
        return self.bytes_read / self.tokens

    @property
    def bytes_missed_per_token(self) -> float:
        """Those of them that were needed."""
        return self.bytes_missed / self.tokens

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {
            "tokens_per_s": self.tokens_per_s,
            "bytes_read_per_token": self.bytes_read_per_token,
            "bytes_missed_per_token": self.bytes_missed_per_token,
            "stall_share": self.stall_s / self.elapsed_s,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunFigures":
        """The inverse of `to_dict`."""
        own = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        return cls(**own | {"rates": MachineRates(**values["rates"])})


def bound(run: RunFigures, rates: MachineRates, kind: Kind) -> Bound:
    """1 / max(bytes missed / disk rate, bytes read from memory / memory rate), both of one token.

    Of a prompt: 1 / max(bytes missed / disk rate, operations / matrix rate).
    """
    disk_s = run.bytes_missed_per_token / rates.disk_bytes_per_s
    if kind == "prefill":
        assert run.operations is not None
        assert rates.matrix_ops_per_s is not None
        other_s = run.operations / run.tokens / rates.matrix_ops_per_s
        return bound_of({"compute": other_s, "disk": disk_s})
    memory_bytes = run.expert_bytes_per_token + run.dense_bytes_per_token + run.kv_bytes_per_token
    return bound_of({"memory": memory_bytes / rates.memory_bytes_per_s, "disk": disk_s})


@dataclass(frozen=True)
class Row:
    """One setting and its runs."""

    setting: Setting
    runs: tuple[RunFigures, ...]

    @property
    def best(self) -> RunFigures:
        """The fastest run."""
        return max(self.runs, key=lambda run: run.tokens_per_s)

    @property
    def median_tokens_per_s(self) -> float:
        """The middle of the runs' speeds."""
        return statistics.median(run.tokens_per_s for run in self.runs)


@dataclass(frozen=True)
class PackFigures:
    """The pack that was measured; ``expert_bytes`` is the largest expert's, ``top_k`` what a token asks of a layer."""

    name: str
    folder: str
    format: str
    dense_format: str
    layers: int
    experts: int
    top_k: int
    expert_bytes: int
    all_expert_bytes: int
    dense_bytes: int


@dataclass(frozen=True)
class BenchReport:
    """Everything that one call of ``bench`` has measured."""

    machine: dict[str, Any]
    pack: PackFigures
    workload: Workload
    rows: tuple[Row, ...]

    @property
    def rates(self) -> MachineRates:
        """The best rates measured beside any of the runs."""
        return reduce(MachineRates.best, (run.rates for row in self.rows for run in row.runs))

    def bound(self, row: Row) -> Bound:
        """The bound of the row's best run."""
        return bound(row.best, self.rates, self.workload.kind)

    def bound_share(self, row: Row) -> float:
        """How much of its bound the row's best run reached."""
        return row.best.tokens_per_s / self.bound(row).tokens_per_s

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; see the module."""
        return {
            "schema": SCHEMA,
            "machine": self.machine,
            "pack": asdict(self.pack),
            "workload": asdict(self.workload),
            "rates": asdict(self.rates),
            "rows": [self._row(row) for row in self.rows],
        }

    def _row(self, row: Row) -> dict[str, Any]:
        limit = self.bound(row)
        return {
            "setting": asdict(row.setting),
            "best_tokens_per_s": row.best.tokens_per_s,
            "median_tokens_per_s": row.median_tokens_per_s,
            "bound_tokens_per_s": limit.tokens_per_s,
            "bound_share": self.bound_share(row),
            "bound_by": limit.by,
            "best": row.best.to_dict(),
            "runs": [run.to_dict() for run in row.runs],
        }
