"""PTX as tests carry it out, by examples of the PTX ISA's own rules."""

import numpy as np
import pytest

pytest.importorskip("triton")

from interpreted_ptx import LANES, _keep, _permute, _shuffle


@pytest.mark.parametrize(
    ("selectors", "result"),
    [
        (0x3210, 0x83828180),
        (0x7654, 0x07060504),
        (0x0123, 0x80818283),
        (0x5140, 0x05810480),
        (0xFFFF3210, 0x83828180),  # only four nibbles are looked at
        (0xBA98, 0xFFFFFFFF),  # signs of the first number's bytes
        (0xC810, 0x00FF8180),
    ],
)
def test_bytes_are_permuted(selectors: int, result: int) -> None:
    low, high = (np.array([word], dtype=np.uint64) for word in (0x83828180, 0x07060504))
    assert _permute(low, high, np.array([selectors], dtype=np.uint64)) == [result]


def test_a_shuffle_in_half_a_warp_looks_at_four_bits() -> None:
    half_warp, all_lanes = np.uint64(0x101F), np.uint64(0xFFFFFFFF)
    table = _keep(LANES % np.uint64(16) * np.uint64(3))
    codes = np.array([0, 15, 0x1F, 0xFFF5], dtype=np.uint64)
    assert _shuffle(np.broadcast_to(table, codes.shape), codes, half_warp, all_lanes).tolist() == [0, 45, 45, 15]
    with pytest.raises(AssertionError, match="all lanes"):
        _shuffle(_keep(LANES), codes[:1], half_warp, all_lanes)
