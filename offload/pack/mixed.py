"""``mixed:BITS``: which weight of which layer gets how many bits, so that BITS on average do the least harm.

The plan is made from shapes alone, before weights are read, since a checkpoint on a hub is gone through once. What
rounding a weight costs is therefore a prior and no measurement: the tables below, times the format's squared error.
"""

import heapq
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from moe_offload.errors import ConfigError, FormatError
from moe_offload.offload.experts.containers import ExpertContainer
from moe_offload.quant import get_format

PREFIX = "mixed:"
MIXED = f"{PREFIX}BITS"
# Squared error of a weight, relative to its energy: SmolLM2-135M, by `benchmarks/perplexity.py`.
_SQUARED_ERRORS = {"nf3": 0.0242, "nf4": 0.0087, "int8": 0.00005}
FEWEST_BITS, MOST_BITS = 3.13, 8.25
# How much more harm the same squared error does in an expert's last product, and in the first and last layer. The
# latter are moderate for speed's sake: staging slots are as large as the largest layer's, and only those can change
# places with a guess, so no layer is to be two formats ahead of the others. See docs/decisions.md.
_DOWN, _FIRST_LAYER, _LAST_LAYER = 4.0, 1.5, 1.2


@dataclass(frozen=True)
class MixedWeight:
    """One weight that a plan gives a format: of ``num_copies`` experts, ``sensitivity`` per relative squared error."""

    shape: tuple[int, ...]
    num_copies: int
    sensitivity: float


def mixed_bits(spec: str) -> float | None:
    """BITS of ``mixed:BITS``, None for any other format; `ConfigError` for BITS that no mixture has."""
    if not spec.startswith(PREFIX):
        return None
    number = spec.removeprefix(PREFIX)
    if not re.fullmatch(r"\d{1,3}(\.\d{1,3})?", number) or not FEWEST_BITS <= float(number) <= MOST_BITS:
        raise ConfigError(
            f"{spec!r} is no mixed format: write {MIXED} with the average bits of an expert's weight, "
            f"{FEWEST_BITS} to {MOST_BITS}, like {PREFIX}3.5"
        )
    return float(number)


def canonical(spec: str) -> str:
    """The one spelling of a format: ``mixed:3.50`` is ``mixed:3.5``."""
    bits = mixed_bits(spec)
    return spec if bits is None else f"{PREFIX}{bits:g}"


def weight_formats(containers: Sequence[ExpertContainer], spec: str) -> list[dict[str, str]]:
    """For each container: the format of each of its experts' matrices, by part; all ``spec`` unless that is mixed."""
    bits = mixed_bits(spec)
    matrices = [[param for param in container.params if len(param.shape) > 1] for container in containers]
    if bits is None:
        return [{param.part: spec for param in params} for params in matrices]
    weights = []
    for layer_idx, (container, params) in enumerate(zip(containers, matrices, strict=True)):
        layer_weights = sum(math.prod(param.shape) for param in params)
        for param in params:
            share = math.prod(param.shape) / layer_weights
            sensitivity = share * layer_sensitivity(layer_idx, len(containers))
            if param is params[-1] and len(params) > 1:
                sensitivity *= _DOWN
            weights.append(MixedWeight(param.packed_shape, container.num_experts, sensitivity))
    chosen = iter(plan_mixed(weights, bits))
    return [{param.part: next(chosen) for param in params} for params in matrices]


def layer_sensitivity(layer_idx: int, num_layers: int) -> float:
    """How much more harm rounding does in this layer than in one in the middle."""
    return _FIRST_LAYER if layer_idx == 0 else _LAST_LAYER if layer_idx == num_layers - 1 else 1.0


def plan_mixed(weights: Sequence[MixedWeight], bits: float) -> list[str]:
    """The format of each weight: at most ``bits`` on average, scales and padding included.

    Every weight begins with its smallest format; those whose step to a larger one saves the most harm for a byte take
    it, one after the other, up to the first that does not fit. So with more bits no weight gets fewer. `FormatError`
    if even the smallest formats take more.
    """
    budget_bytes = bits * sum(math.prod(weight.shape) * weight.num_copies for weight in weights) / 8
    ladders = [_ladder(weight) for weight in weights]
    spent_bytes = sum(ladder[0].size_bytes for ladder in ladders)
    if spent_bytes > budget_bytes:
        fewest = math.ceil(bits * spent_bytes / budget_bytes * 1000) / 1000
        raise FormatError(
            f"{PREFIX}{bits:g} is less than this model's experts take with all weights in their smallest formats; "
            f"use {PREFIX}{fewest:g} or more"
        )
    steps = [0] * len(weights)
    waiting = [(-ladder[1].saved_per_byte, index) for index, ladder in enumerate(ladders) if len(ladder) > 1]
    heapq.heapify(waiting)
    while waiting:
        _, index = heapq.heappop(waiting)
        ladder, step = ladders[index], steps[index]
        spent_bytes += ladder[step + 1].size_bytes - ladder[step].size_bytes
        if spent_bytes > budget_bytes:
            break
        steps[index] = step = step + 1
        if step + 1 < len(ladder):
            heapq.heappush(waiting, (-ladder[step + 1].saved_per_byte, index))
    return [ladder[step].format for ladder, step in zip(ladders, steps, strict=True)]


@dataclass(frozen=True)
class _Rung:
    """A format of a weight, and what stepping up to it from the one below saves."""

    format: str
    size_bytes: int
    saved_per_byte: float


def _ladder(weight: MixedWeight) -> list[_Rung]:
    """The formats worth having, from the smallest up, each step saving no more for a byte than the one before."""
    sizes = {spec: get_format(spec).nbytes(weight.shape) * weight.num_copies for spec in _SQUARED_ERRORS}
    lowest = min(sizes, key=lambda spec: (sizes[spec], _SQUARED_ERRORS[spec]))
    ladder = [_Rung(lowest, sizes[lowest], 0.0)]
    while True:
        below = ladder[-1]

        def rung(spec: str, below: _Rung = below) -> _Rung:
            saved = weight.sensitivity * (_SQUARED_ERRORS[below.format] - _SQUARED_ERRORS[spec])
            return _Rung(spec, sizes[spec], saved / (sizes[spec] - below.size_bytes))

        better = [
            rung(spec)
            for spec in sizes
            if sizes[spec] > below.size_bytes and _SQUARED_ERRORS[spec] < _SQUARED_ERRORS[below.format]
        ]
        if not better:
            return ladder
        ladder.append(max(better, key=lambda rung: (rung.saved_per_byte, rung.size_bytes)))
