"""What a model's own traces taught: a small network beside the recall of like tokens."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_offload.cache import kernels
from moe_offload.cache.native_policy import NativePolicy
from moe_offload.cache.policy import Policy
from moe_offload.cache.recall import Floats, RecallPolicy, is_token


@dataclass(frozen=True, eq=False)
class LearnedWeights:
    """A network of one hidden layer: ``width`` sums over what this token has chosen so far and the one before chose.

    Its output for each expert of a layer is added to the scores of `RecallPolicy`. All arrays are float32.
    """

    start: Floats  # [width]: the sums before anything is chosen
    now: tuple[Floats, ...]  # by layer [experts, width]: what a choice of this token adds
    before: tuple[Floats, ...]  # by layer [experts, width]: what a choice of the token before adds
    out: tuple[Floats, ...]  # by layer [width, experts]
    bias: tuple[Floats, ...]  # by layer [experts]

    @property
    def width(self) -> int:
        return len(self.start)

    @property
    def num_experts(self) -> tuple[int, ...]:
        """By layer."""
        return tuple(len(bias) for bias in self.bias)


class LearnedPolicy:
    """Keeps what the recall of like tokens and a fitted network together foresee.

    The reference for `cache/csrc/learned.cpp`, to the last bit; takes its place where no library was built.
    """

    def __init__(self, weights: LearnedWeights) -> None:
        self._weights = weights
        self._recall = RecallPolicy(weights.num_experts)
        self._state: Floats = weights.start.copy()  # of this token so far
        self._for_next: Floats = np.zeros_like(weights.start)  # what it leaves for the next one
        self._last_layer = -1

    def touch(self, layer_idx: int, expert_ids: Sequence[int], weights: Sequence[float] | None) -> None:
        self._recall.touch(layer_idx, expert_ids, weights)
        if not expert_ids:
            return
        if not is_token(len(expert_ids), self._weights.num_experts[layer_idx]):
            self._cut()
            return
        if layer_idx <= self._last_layer:
            self._state = self._weights.start + self._for_next
            self._for_next = np.zeros_like(self._state)
        self._last_layer = layer_idx
        for expert_idx in expert_ids:
            self._state += self._weights.now[layer_idx][expert_idx]
            self._for_next += self._weights.before[layer_idx][expert_idx]

    def scores(self, layer_idx: int) -> Sequence[float]:
        recalled = np.array(self._recall.scores(layer_idx))
        values = self._weights.bias[layer_idx].copy()
        inputs = self._state / (np.float32(1) + np.abs(self._state))
        for weights, value in zip(self._weights.out[layer_idx], inputs, strict=True):  # one by one, as the library adds
            values += weights * value
        scores: list[float] = np.where(recalled > 0, recalled + values.astype(np.float64), 0.0).tolist()
        return scores

    def new_sequence(self) -> None:
        self._recall.new_sequence()
        self._cut()

    def _cut(self) -> None:
        self._state = self._weights.start.copy()
        self._for_next = np.zeros_like(self._state)
        self._last_layer = -1


class NativeLearnedPolicy(NativePolicy):
    """`LearnedPolicy` in the library, which must have been built."""

    def __init__(self, weights: LearnedWeights) -> None:
        library = kernels.quick_library()
        assert library is not None
        arrays = [np.ascontiguousarray(weights.start, np.float32)]
        arrays += [_joined(layers) for layers in (weights.now, weights.before, weights.out, weights.bias)]
        num_experts = weights.num_experts
        sizes = (ctypes.c_int32 * len(num_experts))(*num_experts)
        given = kernels.LearnedWeights(weights.width, *(array.ctypes.data for array in arrays))
        handle = library.moe_cache_learned_new(len(num_experts), sizes, ctypes.byref(given))
        if not handle:
            raise MemoryError("no memory for the policy 'learned'")
        self._adopt(library, handle, num_experts)


def make_learned_policy(weights: LearnedWeights) -> Policy:
    """The policy of these weights, compiled where it can be."""
    return LearnedPolicy(weights) if kernels.library() is None else NativeLearnedPolicy(weights)


def _joined(layers: tuple[Floats, ...]) -> npt.NDArray[np.float32]:
    return np.concatenate([np.asarray(layer, np.float32).reshape(-1) for layer in layers])
