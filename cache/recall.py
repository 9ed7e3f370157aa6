"""What came after tokens like this one, and decayed frequencies."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_offload.cache.token_history import ONE, TokenHistory

Floats = npt.NDArray[np.float32]

HALF_LIVES_EVENTS = (2, 8, 24, 128, 1000)
# Fitted by temporal differences on half the sequences of gpt-oss-20b, DeepSeek-V2-Lite and OLMoE (docs/policies.md).
RATE_WEIGHTS = (-0.032, -0.070, 0.293, 0.288, -0.199)
AGE_WEIGHT, RANK_WEIGHT, VOTE_WEIGHT = -0.160, -0.238, 0.379
NEW_SEQUENCE_SHARE = 0.3  # of what was counted before
UNSEEN = 0.03  # added to a share, in units of the average one, before its logarithm
PRIOR_VOTES = 2  # of best matches, for the long-term rates
OLDEST_AGE = 2000
USED = 64.0  # any expert that was ever used is ahead of all that never were

_f32 = np.float32


class _Layer:
    """What one layer counts."""

    def __init__(self, num_experts: int) -> None:
        self.rates = [np.zeros(num_experts, np.float32) for _ in HALF_LIVES_EVENTS]  # decayed shares of events
        self.observed = [_f32(0) for _ in HALF_LIVES_EVENTS]  # what they would be of an expert that all asked for
        self.last_use = np.zeros(num_experts, np.int64)  # by the clock; 0: never
        self.last_rank = np.ones(num_experts, np.float32)  # from 0, the best, to 1
        self.clock = 0
        self.base = _f32(1)  # share of its experts that a token chooses


class RecallPolicy:
    """Keeps what will be used soon, foreseen from the tokens after those that were most like this one.

    A score is a weighted sum of logarithms: of the votes of `TokenHistory`, of how often an expert was asked for at
    several half-lives, of the time since, and of its rank then. The weights are fixed, the same for all models.
    This is the reference for `cache/csrc/recall.cpp`, to the last bit, and takes its place where no library was built.
    """

    def __init__(self, num_experts: Sequence[int]) -> None:
        self._layers = [_Layer(n) for n in num_experts]
        self._scores = [[0.0] * n for n in num_experts]
        self._history = TokenHistory(num_experts)
        self._kept = [_f32(2.0 ** (-1 / half_life)) for half_life in HALF_LIVES_EVENTS]

    def touch(self, layer_idx: int, expert_ids: Sequence[int], weights: Sequence[float] | None) -> None:
        layer, num = self._layers[layer_idx], len(expert_ids)
        if not num:
            return
        num_experts = len(layer.last_use)
        of_token = is_token(num, num_experts)
        chosen = np.array(expert_ids, np.int64)
        shares = np.ones(num, np.float32)
        if not of_token and weights is not None and np.float64(np.float16(np.float32(weights[0]))) > 0:
            rounded = np.array(weights, np.float32).astype(np.float16).astype(np.float64)
            shares = (rounded / rounded[0]).astype(np.float32)
        layer.clock += 1
        for rate, kept in enumerate(self._kept):
            added = _f32(1) - kept
            layer.observed[rate] = layer.observed[rate] * kept + added
            layer.rates[rate] *= kept
            layer.rates[rate][chosen] += added * shares
        layer.last_use[chosen] = layer.clock
        layer.last_rank[chosen] = np.arange(num, dtype=np.float32) / _f32(num)
        if of_token:
            layer.base = _f32(num) / _f32(num_experts)
            self._history.add(layer_idx, expert_ids)
        else:  # several tokens' experts: of which each was, nobody knows
            self._history.cut()

    def scores(self, layer_idx: int) -> Sequence[float]:
        layer = self._layers[layer_idx]
        if not layer.clock:
            return self._scores[layer_idx]
        base = layer.base
        votes, num_cast = self._history.vote(layer_idx)
        value = np.zeros(len(votes), np.float32)
        for rate, weight in enumerate(RATE_WEIGHTS):
            prior = _f32(0.1) / _f32(rate + 1)
            scale = _f32(1) / ((layer.observed[rate] + prior) * base)
            value += _f32(weight) * _log2((layer.rates[rate] + prior * base) * scale + _f32(UNSEEN))
        prior_scale = _f32(PRIOR_VOTES) / (layer.observed[-1] + _f32(0.1))
        prior_votes = (layer.rates[-1] + _f32(0.1) * base) * prior_scale
        scale = _f32(1) / ((_f32(num_cast) / _f32(ONE) + _f32(PRIOR_VOTES)) * base)
        voted = votes.astype(np.float32) / _f32(ONE) + prior_votes
        value += _f32(VOTE_WEIGHT) * _log2(voted * scale + _f32(UNSEEN))
        age = 1 + np.minimum(layer.clock - layer.last_use, OLDEST_AGE)
        value += _f32(AGE_WEIGHT) * _log2(age.astype(np.float32))
        value += _f32(RANK_WEIGHT) * layer.last_rank
        scores = np.where(layer.last_use > 0, USED + value.astype(np.float64), 0.0)
        self._scores[layer_idx] = scores.tolist()
        return self._scores[layer_idx]

    def new_sequence(self) -> None:
        share = _f32(NEW_SEQUENCE_SHARE)
        for layer in self._layers:
            layer.observed = [observed * share for observed in layer.observed]
            for rates in layer.rates:
                rates *= share
        self._history.cut()


def is_token(num_asked: int, num_experts: int) -> bool:
    """Whether an event is of one token, or so few that it makes no difference; else it is of a prompt."""
    return num_asked <= 32 and 2 * num_asked <= num_experts + 1


def _log2(values: Floats) -> Floats:
    """Between powers of two a straight line: the same on every machine, and good to 0.09."""
    return values.view(np.int32).astype(np.float32) * _f32(2.0**-23) - _f32(127)
