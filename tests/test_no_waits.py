"""What a rehearsal of a step finds out before anything is recorded."""

from collections.abc import Callable

import pytest
import torch

from moe_offload.offload.graphs.no_waits import NoWaits
from moe_offload.offload.graphs.recorder import RecordingError

NUMBERS = torch.arange(6.0)
MASK = NUMBERS > 2


def to_another_device() -> None:
    NUMBERS.to("meta")


WAITS: dict[str, Callable[[], object]] = {
    "item": NUMBERS.max().item,
    "truth": lambda: bool(MASK.any()),
    "nonzero": MASK.nonzero,
    "where": lambda: torch.where(MASK),
    "mask": lambda: NUMBERS[MASK],
    "masked_select": lambda: NUMBERS.masked_select(MASK),
    "unique": NUMBERS.unique,
    "equal": lambda: torch.equal(NUMBERS, NUMBERS),
    "repeats": lambda: NUMBERS.repeat_interleave(torch.tensor([1, 2, 0, 1, 1, 1])),
    "copy": to_another_device,
}
FREE: dict[str, Callable[[], object]] = {
    "index": lambda: NUMBERS[torch.tensor([1, 2])],
    "masked_fill": lambda: NUMBERS.masked_fill(MASK, 0.0),
    "where": lambda: torch.where(MASK, NUMBERS, 0.0),
    "repeats": lambda: NUMBERS.repeat_interleave(2),
    "linear": lambda: torch.nn.functional.linear(NUMBERS, NUMBERS.expand(2, 6)),
    "attention": lambda: torch.nn.functional.scaled_dot_product_attention(*[torch.ones(1, 2, 3, 4)] * 3),
    "dtype": lambda: NUMBERS.to(torch.float64),
}


@pytest.mark.parametrize("name", WAITS)
def test_waits_are_found(name: str):
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode, pytest.raises(RecordingError), NoWaits():
            WAITS[name]()


@pytest.mark.parametrize("name", FREE)
def test_what_does_not_wait_is_computed(name: str):
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            expected = FREE[name]()
            with NoWaits():
                found = FREE[name]()
            assert torch.equal(found, expected)
