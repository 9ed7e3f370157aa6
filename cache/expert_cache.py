"""Which experts are in which slots, who holds them, and who has to go."""

import itertools
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence

from moe_offload.cache.counts import Phase
from moe_offload.cache.layer import Layer
from moe_offload.cache.lease import Admit, Lease, Placement
from moe_offload.cache.observer import CacheObserver
from moe_offload.cache.policy import Policy
from moe_offload.cache.registry import make_policy
from moe_offload.cache.stats import CacheStats
from moe_offload.cache.trace import EventKind
from moe_offload.errors import ConfigError


class ExpertCache:
    """Decides over experts and slots of all layers; moves no bytes. Every method is thread-safe.

    Whoever acquires or prefetches brings the bytes of the placements it was given and then says `mark_loaded`, or
    `mark_failed`, or for a prefetch `drop_prefetch`; until one of them, the slot is taken to be written to and is
    never evicted. Slots are numbered from 0 in every layer; only a resize leaves gaps.
    """

    def __init__(
        self,
        num_experts: Sequence[int],
        num_slots: Sequence[int],
        policy: str | Policy = "lru",
        *,
        floors: Sequence[int] | None = None,
    ) -> None:
        """One number per layer in each: experts, slots at the start, and slots that a resize leaves (default 1)."""
        self._num_experts = list(num_experts)
        self._first_num_slots = list(num_slots)
        self._floors = [1] * len(num_experts) if floors is None else list(floors)
        if not len(num_experts) == len(num_slots) == len(self._floors):
            raise ConfigError(
                f"num_experts, num_slots and floors must be as long as each other, not "
                f"{len(num_experts)}, {len(num_slots)} and {len(self._floors)} layers"
            )
        for layer_idx, layer_slots in enumerate(num_slots):
            self._check_num_slots(layer_idx, layer_slots)
        self._policy = make_policy(policy, num_experts) if isinstance(policy, str) else policy
        self._layers = [Layer(e, s) for e, s in zip(num_experts, num_slots, strict=True)]
        self._lock = threading.Lock()
        self._leases: dict[int, tuple[int, list[int]]] = {}  # lease_id -> layer_idx and the slots it pins
        self._lease_ids = itertools.count()
        self._abandoned: deque[int] = deque()
        self._observer: CacheObserver | None = None
        self.stats = CacheStats(self._lock, self._layers)

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def num_experts(self, layer_idx: int) -> int:
        return self._num_experts[layer_idx]

    def num_slots(self, layer_idx: int) -> int:
        with self._lock:
            return self._layers[layer_idx].slots.num_slots

    def observe(self, observer: CacheObserver | None) -> None:
        """Tell ``observer`` of everything from now on; None: nobody.

        First of layers that do not have the slots that they began with, then what is resident and how hot it is.
        """
        with self._lock:
            self._observer = observer
            if observer is None:
                return
            for layer_idx, layer in enumerate(self._layers):
                resident, num_slots = layer.slots.resident_by_slot(), layer.slots.num_slots
                if num_slots != self._first_num_slots[layer_idx]:
                    observer.told(EventKind.RESIZE, layer_idx, (num_slots,))
                if resident:
                    scores = self._policy.scores(layer_idx)
                    hot = sorted((e for e in resident if e >= 0), key=scores.__getitem__, reverse=True)
                    observer.told(EventKind.REMEMBER, layer_idx, hot)
                    observer.told(EventKind.RESIDENT, layer_idx, resident)

    # -- a step --

    def acquire(
        self,
        layer_idx: int,
        expert_ids: Sequence[int],
        *,
        weights: Sequence[float] | None = None,
        admit: Admit = Admit.ALWAYS,
        most: int | None = None,
        phase: Phase = "decode",
    ) -> Lease:
        """Hold the slots of these experts, all different, best first, until `release`.

        Where slots are short, the first come first. ``most``: so many of the missing get a slot, those that the policy
        scores highest; None: all that can. ``weights`` are for the policy (see `Policy.touch`).
        """
        with self._lock:
            self._release_abandoned()
            self._check_expert_ids(layer_idx, expert_ids)
            return self._acquire(layer_idx, expert_ids, weights, admit, most, phase)

    def acquire_loaded(
        self, layer_idx: int, expert_ids: Sequence[int], *, weights: Sequence[float] | None = None
    ) -> Lease | None:
        """As `acquire` for a decode step if the bytes of all of them are there; else None, and nothing has changed."""
        with self._lock:
            self._release_abandoned()
            self._check_expert_ids(layer_idx, expert_ids)
            if not all(map(self._layers[layer_idx].slots.is_loaded, expert_ids)):
                return None
            return self._acquire(layer_idx, expert_ids, weights, Admit.ALWAYS, None, "decode")

    def note_used(self, layer_idx: int, expert_ids: Sequence[int], weights: Sequence[float]) -> None:
        """A decode step has used experts that were there without asking. Those that are gone by now are passed over."""
        with self._lock:
            self._release_abandoned()
            self._check_expert_ids(layer_idx, expert_ids)
            is_loaded = self._layers[layer_idx].slots.is_loaded
            used = {e: weight for e, weight in zip(expert_ids, weights, strict=True) if is_loaded(e)}
            lease = self._acquire(layer_idx, list(used), list(used.values()), Admit.ALWAYS, None, "decode")
            self._release(lease.lease_id)
            lease.is_open = False

    def _acquire(
        self,
        layer_idx: int,
        expert_ids: Sequence[int],
        weights: Sequence[float] | None,
        admit: Admit,
        most: int | None,
        phase: Phase,
    ) -> Lease:
        layer, policy = self._layers[layer_idx], self._policy
        lease = Lease(layer_idx, [], [], [], next(self._lease_ids), self._abandoned)
        held: list[int] = []
        self._leases[lease.lease_id] = (layer_idx, held)
        missing = layer.pin_resident(expert_ids, held, lease.hits, lease.prefetched)
        judged_before = admit is Admit.IF_HOTTER
        # What a prompt's step asks for must not decide that a newcomer is hotter.
        if expert_ids and not judged_before:
            policy.touch(layer_idx, expert_ids, weights)
        if missing:
            scores, only_if_hotter = policy.scores(layer_idx), admit is not Admit.ALWAYS
            lease.bypassed = layer.admit_missing(missing, held, lease.misses, scores, only_if_hotter, phase, most)
        if expert_ids and judged_before:
            policy.touch(layer_idx, expert_ids, weights)
        layer.end_request(expert_ids, len(lease.hits), len(lease.misses), phase)
        if self._observer is not None:
            self._observer.acquired(lease, expert_ids, weights, admit)
        return lease

    def release(self, lease: Lease) -> None:
        """Let go of a lease's slots; again is harmless."""
        with self._lock:
            self._release_abandoned()
            self._release(lease.lease_id)
            lease.is_open = False

    def _release(self, lease_id: int) -> None:
        layer_idx, held = self._leases.pop(lease_id, (0, []))
        self._layers[layer_idx].slots.unpin(held)

    def _release_abandoned(self) -> None:
        while self._abandoned:
            self._release(self._abandoned[0])
            self._abandoned.popleft()

    def new_sequence(self) -> None:
        """Tell the policy that another text begins."""
        with self._lock:
            self._policy.new_sequence()
            if self._observer is not None:
                self._observer.told(EventKind.NEW_SEQUENCE, -1, ())

    # -- the bytes --

    def mark_loaded(self, layer_idx: int, expert_idx: int) -> bool:
        """All bytes are in the slot. False, and nothing changes, if the expert is not waiting for any."""
        with self._lock:
            layer = self._layers[layer_idx]
            # A step waits for what it asked for: only what nobody holds comes at a time of its own.
            if self._observer is not None and layer.is_unheld(expert_idx):
                self._observer.told(EventKind.LOADED, layer_idx, (expert_idx,))
            return layer.mark_loaded(expert_idx)

    def mark_failed(self, layer_idx: int, expert_idx: int) -> bool:
        """The bytes did not come, or are bad, and nobody writes to the slot any more. False if it is not resident.

        The expert is gone at once; leases that hold the slot keep it, and it is empty after the last.
        """
        with self._lock:
            if self._observer is not None:
                self._observer.told(EventKind.FAILED, layer_idx, (expert_idx,))
            return self._layers[layer_idx].mark_failed(expert_idx)

    # -- prefetch --

    def admit_prefetch(self, layer_idx: int, expert_ids: Sequence[int], *, evict: bool = True) -> list[Placement]:
        """Slots for those of the experts that are not resident, likeliest first, as far as slots can be had.

        Evicts nothing that is held, that the layer's last step used, or that was prefetched since that step; without
        ``evict`` nothing at all.
        """
        with self._lock:
            self._release_abandoned()
            self._check_expert_ids(layer_idx, expert_ids)
            layer = self._layers[layer_idx]
            if not evict and not layer.slots.empty:
                return []
            if self._observer is not None:
                kind = EventKind.PREFETCH_EVICTING if evict else EventKind.PREFETCH
                self._observer.told(kind, layer_idx, expert_ids)
            return layer.admit_prefetch(expert_ids, self._policy.scores(layer_idx) if evict else (), evict)

    def missing(self, layer_idx: int, expert_ids: Sequence[int]) -> list[int]:
        """Those that have no slot, in the order given."""
        with self._lock:
            slot_of = self._layers[layer_idx].slots.slot_of
            return [expert_idx for expert_idx in expert_ids if slot_of[expert_idx] < 0]

    def drop_prefetch(self, layer_idx: int, expert_idx: int) -> bool:
        """A prefetch was cancelled before its bytes came, and nobody writes to the slot any more.

        False, and nothing changes, if there is no such prefetch (any more): a step has asked for the expert and waits
        for its bytes, or they have come.
        """
        with self._lock:
            if self._observer is not None:
                self._observer.told(EventKind.DROPPED, layer_idx, (expert_idx,))
            return self._layers[layer_idx].drop_prefetch(expert_idx)

    # -- the hot set --

    def resident(self, layer_idx: int) -> dict[int, int]:
        """Expert -> slot of those whose bytes are there."""
        with self._lock:
            slots = self._layers[layer_idx].slots
            return {expert_idx: slots.slot_of[expert_idx] for expert_idx in slots.loaded_experts()}

    def hot_set(self) -> list[list[int]]:
        """The loaded experts of every layer, hottest first: what `admit_warm` wants after a restart."""
        with self._lock:
            hot = []
            for layer_idx, layer in enumerate(self._layers):
                scores = self._policy.scores(layer_idx)
                hot.append(sorted(layer.slots.loaded_experts(), key=scores.__getitem__, reverse=True))
            return hot

    def remember(self, layer_idx: int, expert_ids: Sequence[int]) -> None:
        """Tell the policy what was hot before a restart, hottest first."""
        with self._lock:
            self._check_expert_ids(layer_idx, expert_ids)
            if self._observer is not None:
                self._observer.told(EventKind.REMEMBER, layer_idx, expert_ids)
            for expert_idx in reversed(expert_ids):
                self._policy.touch(layer_idx, [expert_idx], None)

    def admit_warm(self, layer_idx: int, expert_ids: Sequence[int]) -> list[Placement]:
        """Empty slots, while there are any, for those of the experts that are not resident, hottest first.

        The policy is not told: see `remember`.
        """
        with self._lock:
            self._release_abandoned()
            self._check_expert_ids(layer_idx, expert_ids)
            placements = self._layers[layer_idx].admit_warm(expert_ids)
            if self._observer is not None and placements:
                self._observer.told(EventKind.WARM, layer_idx, [placement.expert_idx for placement in placements])
            return placements

    # -- size --

    def resize(self, layer_idx: int, num_slots: int) -> list[int]:
        """Change the number of a layer's slots; returns the numbers of those added or given back.

        Shrinking gives back empty slots, then the coldest; held and loading ones stay, so it may fall short: call
        again when steps have ended. ConfigError below the layer's floor or above its number of experts.
        """
        self._check_num_slots(layer_idx, num_slots)
        with self._lock:
            self._release_abandoned()
            if self._observer is not None:
                self._observer.told(EventKind.RESIZE, layer_idx, (num_slots,))
            return self._layers[layer_idx].resize(num_slots, self._policy.scores(layer_idx))

    def repack(self, layer_idx: int, num_slots: int, move: Callable[[dict[int, int]], bool]) -> bool:
        """As `resize`, but all at once, and what stays is in the slots 0 to ``num_slots`` - 1 afterwards.

        ``move`` is told each expert's old slot and its new one, and moves the bytes while nobody can ask for them;
        False if it has lost them. Returns False, and nothing changes, while a slot of the layer is held or its bytes
        are on their way.
        """
        self._check_num_slots(layer_idx, num_slots)
        with self._lock:
            self._release_abandoned()
            layer = self._layers[layer_idx]
            if not layer.slots.is_quiet:
                return False
            scores = self._policy.scores(layer_idx)
            if num_slots >= layer.slots.num_slots and layer.slots.num_slots == len(layer.slots.state):
                # Before anything else: there may be no memory for more.
                are_there = move({slot: slot for slot in layer.slots.slot_of if slot >= 0})
                layer.repack(num_slots, scores)
            else:
                are_there = move(layer.repack(num_slots, scores))
            if not are_there:
                for expert_idx in layer.slots.loaded_experts():
                    layer.mark_failed(expert_idx)
            if self._observer is not None:
                self._observer.told(EventKind.RESIZE, layer_idx, (num_slots,))
            return True

    # -- consistency --

    def recover(self, in_flight: Collection[tuple[int, int]]) -> None:
        """Put things right after an interrupt (Ctrl-C), wherever in this class it struck.

        ``in_flight``: every (layer_idx, expert_idx) whose bytes somebody is still bringing. Experts that wait for bytes
        that nobody brings, and that no lease holds, lose their slots.
        """
        with self._lock:
            while self._abandoned:
                self._leases.pop(self._abandoned[0], None)
                self._abandoned.popleft()
            pins = self._held_pins()
            for layer_idx, layer in enumerate(self._layers):
                layer.rebuild(pins[layer_idx], {expert_idx for at, expert_idx in in_flight if at == layer_idx})

    def check_integrity(self) -> None:
        """AssertionError, with details, if anything contradicts itself."""
        with self._lock:
            self._release_abandoned()
            pins = self._held_pins()
            for layer_idx, layer in enumerate(self._layers):
                try:
                    layer.check_integrity(pins[layer_idx])
                    assert layer.slots.num_slots >= self._floors[layer_idx], (
                        f"{layer.slots.num_slots} slots, below floor"
                    )
                except AssertionError as error:
                    raise AssertionError(f"layer {layer_idx}: {error}") from None

    def _held_pins(self) -> list[Counter[int]]:
        pins: list[Counter[int]] = [Counter() for _ in self._layers]
        for layer_idx, held in self._leases.values():
            pins[layer_idx].update(held)
        return pins

    # -- arguments --

    def _check_num_slots(self, layer_idx: int, num_slots: int) -> None:
        floor, num_experts = max(1, self._floors[layer_idx]), self._num_experts[layer_idx]
        if not floor <= num_slots <= num_experts:
            raise ConfigError(
                f"layer {layer_idx} cannot have {num_slots} expert slots: "
                f"it needs at least {floor} and has use for at most {num_experts}"
            )

    def _check_expert_ids(self, layer_idx: int, expert_ids: Sequence[int]) -> None:
        if not expert_ids:
            return
        num_experts = self._num_experts[layer_idx]
        if len(set(expert_ids)) != len(expert_ids) or min(expert_ids) < 0 or max(expert_ids) >= num_experts:
            raise ConfigError(
                f"layer {layer_idx}: expert ids must all differ and lie in 0..{num_experts - 1}, got {list(expert_ids)}"
            )
