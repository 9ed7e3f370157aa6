"""How a budget of bytes becomes slots: every layer the same share of its experts, as far as whole slots allow."""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class SlotNeed:
    """One layer's experts: how many, how large a slot, and the fewest slots that it can work with."""

    num_experts: int
    slot_bytes: int
    floor: int


def slots_bytes(needs: Sequence[SlotNeed], num_slots: Sequence[int]) -> int:
    """Bytes of so many slots a layer."""
    return sum(need.slot_bytes * slots for need, slots in zip(needs, num_slots, strict=True))


def fill_slots(needs: Sequence[SlotNeed], budget_bytes: int) -> list[int]:
    """Slots of each layer; the floors must fit.

    First the largest share of the experts that fits for all layers, then slot by slot for the
    layer furthest behind, while there is room.
    """

    def at(share: Fraction) -> list[int]:
        return [min(need.num_experts, max(need.floor, int(share * need.num_experts))) for need in needs]

    if not needs:
        return []
    # Only at these shares does any layer gain a slot.
    shares = sorted({Fraction(k, need.num_experts) for need in needs for k in range(need.num_experts + 1)})
    fitting = bisect.bisect_right(shares, budget_bytes, key=lambda share: slots_bytes(needs, at(share)))
    assert fitting > 0, "the floors do not fit"
    num_slots = at(shares[fitting - 1])
    left_bytes = budget_bytes - slots_bytes(needs, num_slots)
    while True:
        growing = [
            layer_idx
            for layer_idx, need in enumerate(needs)
            if num_slots[layer_idx] < need.num_experts and need.slot_bytes <= left_bytes
        ]
        if not growing:
            return num_slots
        behind = min(growing, key=lambda layer_idx: num_slots[layer_idx] / needs[layer_idx].num_experts)
        num_slots[behind] += 1
        left_bytes -= needs[behind].slot_bytes


def fewer_slots(slot_bytes: Sequence[int], num_slots: Sequence[int], budget_bytes: int) -> list[int]:
    """What stays of so many slots a layer in a smaller budget: the same share of each layer's, and at least one."""
    needs = [SlotNeed(slots, size, 1) for slots, size in zip(num_slots, slot_bytes, strict=True)]
    return fill_slots(needs, budget_bytes)


def fill_slots_beside(
    needs: Sequence[SlotNeed], budget_bytes: int, beside_bytes: Callable[[Sequence[int]], int]
) -> list[int]:
    """As `fill_slots`, where so many slots a layer cost ``beside_bytes`` more; the floors must fit with theirs."""
    floors = [need.floor for need in needs]
    floor_bytes = slots_bytes(needs, floors)
    room_bytes = budget_bytes - beside_bytes(floors)
    while True:
        num_slots = fill_slots(needs, room_bytes)
        over_bytes = slots_bytes(needs, num_slots) + beside_bytes(num_slots) - budget_bytes
        if over_bytes <= 0 or num_slots == floors:
            return num_slots
        room_bytes = max(floor_bytes, min(room_bytes, slots_bytes(needs, num_slots)) - over_bytes)
