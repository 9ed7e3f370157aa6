"""Which experts of every layer a rank holds."""

from dataclasses import dataclass

from moe_offload.errors import ConfigError


@dataclass(frozen=True)
class Share:
    """Of the experts 0, 1, 2, ... each rank in turn gets one: those of a token are spread as evenly as can be.

    Neighbours often belong to one group of the router (DeepSeek's), which is chosen or left as a whole.
    """

    rank: int
    num_ranks: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.num_ranks:
            raise ConfigError(f"there is no share {self.rank} of {self.num_ranks}; they are counted from 0")

    def rank_of(self, expert_idx: int) -> int:
        """Who holds the expert."""
        return expert_idx % self.num_ranks

    def has(self, expert_idx: int) -> bool:
        """Whether this rank does."""
        return expert_idx % self.num_ranks == self.rank

    def held(self, num_experts: int) -> tuple[int, ...]:
        """The experts of this rank; `ConfigError` if a layer has too few for all ranks to get one."""
        if num_experts < self.num_ranks:
            raise ConfigError(
                f"a layer has {num_experts} experts, too few for {self.num_ranks} ranks; start {num_experts} or fewer"
            )
        return tuple(range(self.rank, num_experts, self.num_ranks))

    @classmethod
    def parse(cls, text: str) -> "Share":
        """ "1/4": rank 1 of 4."""
        rank, slash, num_ranks = text.partition("/")
        if not (slash and rank.isdecimal() and num_ranks.isdecimal()):
            raise ConfigError(f"{text!r} is no share of the experts; write RANK/RANKS, like 1/4")
        return cls(int(rank), int(num_ranks))

    def __str__(self) -> str:
        return f"{self.rank}/{self.num_ranks}"
