"""Experts prefetched into staging slots: guesses that displace nothing until a step asks for them."""

import queue
import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from moe_offload.cache import PrefetchCounts
from moe_offload.offload.tiers.compute_tier import ComputeTier, Transfer

Key = tuple[int, int]  # layer_idx, expert_idx


@dataclass(eq=False)
class Guess:
    """An expert in a staging slot, or on its way there. Who takes it says with ``taken`` what follows its arrival."""

    key: Key
    slot: int
    transfer: Transfer | None = None
    arrived: bool = False
    stale: bool = False  # the step that it was meant for has passed
    taken: Callable[[BaseException | None], None] | None = None

    def demand(self) -> None:
        """Somebody has taken it and waits."""
        assert self.taken is not None
        if self.arrived:
            self.taken(None)
        elif self.transfer is not None:
            self.transfer.promote()


class Guesses:
    """What is in the staging slots that no step needs just now. Shares the lock and the free slots of its residency.

    Demand goes first: a step that is short of staging takes back what a guess holds, and while it waits for a slot
    nothing new is begun.
    """

    def __init__(self, tier: ComputeTier, lock: threading.RLock, free_staging: "queue.SimpleQueue[int]") -> None:
        self._tier = tier
        self._lock = lock
        self._free_staging = free_staging
        self._guesses: dict[Key, Guess] = {}  # oldest first
        self._wanted: list[Key] = []  # those that found no slot yet, likeliest first
        self._num_waiting = 0  # steps that wait for staging
        self._issued = self._used = self._late = self._wasted = 0
        self.used_bytes = self.dropped_bytes = 0

    def __len__(self) -> int:
        return len(self._guesses)

    @property
    def counts(self) -> PrefetchCounts:
        """What has become of them."""
        with self._lock:
            return PrefetchCounts(self._issued, self._used, self._late, self._wasted)

    def want(self, layer_idx: int, expert_ids: Iterable[int]) -> None:
        """Bring these, likeliest first, as staging slots come free; of this layer, no others are wanted any more."""
        with self._lock:
            keys = [(layer_idx, expert_idx) for expert_idx in expert_ids]
            for key in keys:
                if key in self._guesses:
                    self._guesses[key].stale = False
            self._wanted = [key for key in self._wanted if key[0] != layer_idx]
            self._wanted += [key for key in keys if key not in self._guesses]
        self.go_on()

    def go_on(self) -> None:
        """Begin what is wanted, as far as there are slots that nobody needs."""
        while self._wanted and (guess := self._next()) is not None:
            self._begin(guess)

    def _next(self) -> Guess | None:
        with self._lock:
            if not self._wanted or self._num_waiting:
                return None
            try:
                slot = self._free_staging.get_nowait()
            except queue.Empty:
                old = next((guess for guess in self._guesses.values() if guess.stale and guess.arrived), None)
                if old is None:
                    return None
                slot = self._drop(old)
            key = self._wanted.pop(0)
            guess = self._guesses[key] = Guess(key, slot)
            self._issued += 1
            return guess

    def _begin(self, guess: Guess) -> None:
        def done(error: BaseException | None) -> None:
            self._done(guess, error)

        try:
            transfer = self._tier.begin(*guess.key, guess.slot, speculative=True, done=done)
        except Exception as error:
            done(error)
            return
        with self._lock:
            guess.transfer = transfer
            if guess.taken is not None:  # a step came to wait for it while it was begun
                transfer.promote()

    def _done(self, guess: Guess, error: BaseException | None) -> None:
        with self._lock:
            taken = guess.taken
            if taken is None and error is None:
                guess.arrived = True
            elif taken is None:  # cancelled; or it failed, and a step that needs it will meet the same error
                del self._guesses[guess.key]
                self._wasted += 1
                self._free_staging.put(guess.slot)
        if taken is not None:
            taken(error)
        elif error is not None:
            self.go_on()

    def _drop(self, guess: Guess) -> int:
        del self._guesses[guess.key]
        self._wasted += 1
        self.dropped_bytes += self._tier.expert_bytes(guess.key[0])
        return guess.slot

    # -- a step; with the lock held, which `take` and what is done with its answer must share --

    def take(self, layer_idx: int, expert_idx: int) -> Guess | None:
        """The guess that a step needs, if any. The caller sets ``taken``, lets go of the lock, and demands it."""
        guess = self._guesses.pop((layer_idx, expert_idx), None)
        if guess is None:
            if (layer_idx, expert_idx) in self._wanted:
                self._wanted.remove((layer_idx, expert_idx))
            return None
        if guess.arrived:
            self._used += 1
        else:
            self._late += 1
        self.used_bytes += self._tier.expert_bytes(layer_idx)
        return guess

    # -- what is not needed --

    def give_up(self, layer_idx: int, keep: Collection[int]) -> None:
        """Stop what is under way or wanted for a layer, but for ``keep``; what has come stays until room is needed."""
        with self._lock:
            self._wanted = [key for key in self._wanted if key[0] != layer_idx or key[1] in keep]
            for guess in list(self._guesses.values()):
                if guess.key[0] == layer_idx and guess.key[1] not in keep:
                    guess.stale = True
                    if not guess.arrived and guess.transfer is not None:
                        guess.transfer.cancel()

    def make_room(self) -> None:
        """A step needs a staging slot: one comes free soon, if any guess holds one."""
        with self._lock:
            order = sorted(self._guesses.values(), key=lambda guess: (not guess.arrived, not guess.stale))
            if order and order[0].arrived:
                self._free_staging.put(self._drop(order[0]))
            elif order and order[0].transfer is not None:
                order[0].transfer.cancel()

    def waiting(self, change: int) -> None:
        """So many more steps wait for staging."""
        with self._lock:
            self._num_waiting += change
