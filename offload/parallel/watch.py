"""Whether all ranks are alive: each counts in the group's store, and looks whether the others do.

Time is counted in rounds of this process: one that was stopped, with all others or alone, does not take itself for the
only one that went on.
"""

import threading
from collections.abc import Callable

from torch.distributed import Store  # type: ignore[attr-defined]

from moe_offload.errors import GroupError, PeerFailedError, PeerLostError

ROUND_S = 0.25


class Watch:
    """Two threads: one counts and reads in the store, the other sees that the first gets on."""

    def __init__(
        self, connect: Callable[[], Store], rank: int, num_ranks: int, silence_s: float, on_lost: Callable[[], None]
    ) -> None:
        """``connect`` makes a connection of the thread's own; ``on_lost`` is called once, when ``error`` is set."""
        self.error: GroupError | None = None
        self._connect, self._on_lost = connect, on_lost
        self._rank, self._others = rank, [other for other in range(num_ranks) if other != rank]
        self._most_rounds = max(1, round(silence_s / ROUND_S))
        self._silence_s = silence_s
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._num_rounds = 0
        for name, target in (("moe-offload-beat", self._beat), ("moe-offload-watch", self._watch)):
            threading.Thread(target=target, name=name, daemon=True).start()

    def check(self) -> None:
        """Raise if a rank was lost or has failed."""
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """The group ends: who is silent from now on has left."""
        self._stopped.set()

    def _beat(self) -> None:
        counts, silent = dict.fromkeys(self._others, 0), dict.fromkeys(self._others, 0)
        try:
            store = self._connect()
            while not self._stopped.wait(ROUND_S):
                store.add(f"beat/{self._rank}", 1)
                for other in self._others:
                    if store.check([f"failed/{other}"]):
                        reason = store.get(f"failed/{other}").decode()
                        self._lost(PeerFailedError(f"rank {other} has failed: {reason}"))
                    count = store.add(f"beat/{other}", 0)
                    silent[other] = silent[other] + 1 if count == counts[other] else 0
                    counts[other] = count
                    if silent[other] > self._most_rounds:
                        self._lost(self._silence(f"rank {other}"))
                self._num_rounds += 1
        except RuntimeError as error:  # torch.distributed's errors are
            reason = str(error).partition("\n")[0]
            self._lost(PeerLostError(f"the connection to rank 0 was lost: its process has ended ({reason:.120})"))

    def _watch(self) -> None:
        silent = num_rounds = 0
        while not self._stopped.wait(ROUND_S):
            silent = silent + 1 if num_rounds == self._num_rounds else 0
            num_rounds = self._num_rounds
            if silent > self._most_rounds + 4:  # a little later: a rank that is silent is the better explanation
                self._lost(self._silence("the store of the group, at rank 0,"))
                return

    def _silence(self, who: str) -> PeerLostError:
        return PeerLostError(
            f"{who} has given no sign of life for {self._silence_s:g} s: its machine or the network is down, or it was "
            "stopped; start all ranks again (MOE_OFFLOAD_PEER_TIMEOUT says how long to wait)"
        )

    def _lost(self, error: GroupError) -> None:
        with self._lock:
            if self._stopped.is_set() or self.error is not None:
                return
            self.error = error
        self._stopped.set()
        self._on_lost()
