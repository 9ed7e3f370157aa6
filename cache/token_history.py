"""The last tokens, by the experts that they chose, and what came after those most like the token under way.

Text repeats itself, and so does its routing: where a token chose, layer by layer, the experts that an earlier token
chose, the tokens after it will choose much of what the tokens after that one chose. It is attention over the routing
of the past, with nothing trained in it. `cache/csrc/token_history.cpp` does the same, faster.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

NUM_TOKENS = 2048  # that are remembered
HORIZON = 8  # tokens that a match votes for
ONE = 4096  # the vote of the best match
SHARPNESS = 18  # a match counts e times less for every 1/18 that it is less like this token
BEFORE_SHARE = 1 / 3  # of likeness: that of the tokens before
NEXT_TOKEN_SHARE = 0.75  # of the votes for a token, those for the token after it
STEPS_PER_HALVING = 16
STEPS = 5 * STEPS_PER_HALVING  # a match of less than 1/32 of the best one's weight has no vote
STEPS_PER_LIKENESS = SHARPNESS * 1.4426950408889634 * STEPS_PER_HALVING
LEAST_VOTE = ONE // 32
NUM_MATCHES = 96  # as many vote at most

_WEIGHT = np.floor(ONE * np.exp2(-np.arange(STEPS) / STEPS_PER_HALVING) + 0.5).astype(np.int64)
_SHARE = np.floor(ONE * NEXT_TOKEN_SHARE ** np.arange(HORIZON) + 0.5).astype(np.int64)


class TokenHistory:
    """Remembers the routing of the last tokens. Layers of a token come in order; one that does not begins another."""

    def __init__(self, num_experts: Sequence[int]) -> None:
        self._chose = [np.zeros((n, NUM_TOKENS), np.int16) for n in num_experts]
        self._chosen: list[list[list[int]]] = [[[] for _ in range(NUM_TOKENS)] for _ in num_experts]
        self._follows = np.zeros(NUM_TOKENS, np.bool_)  # on the token before, in the same text
        self._followed = np.zeros(NUM_TOKENS, np.bool_)  # by a token that is over
        self._is_known = np.zeros(NUM_TOKENS, np.bool_)  # is over itself
        self._alike = np.zeros(NUM_TOKENS, np.int16)  # experts in common with the token under way
        self._alike_before = np.zeros(NUM_TOKENS, np.int16)  # the same of their predecessors
        self._num_chosen = self._num_chosen_before = 0
        self._now, self._num_known, self._last_layer = NUM_TOKENS - 1, 0, -1
        self._is_cut, self._has_successor = True, False

    def cut(self) -> None:
        """What comes next does not follow on what is here."""
        self._is_cut = True

    def add(self, layer_idx: int, expert_ids: Sequence[int]) -> None:
        """The token under way, or a new one where the layer is not after the last, has chosen these experts."""
        if self._is_cut or layer_idx <= self._last_layer:
            self._begin_token()
        self._last_layer = layer_idx
        self._num_chosen += len(expert_ids)
        chose = self._chose[layer_idx]
        for expert_idx in expert_ids:
            self._alike += chose[expert_idx]
            chose[expert_idx, self._now] = 1
        self._alike[self._now] = 0
        self._chosen[layer_idx][self._now] = list(expert_ids)

    def vote(self, layer_idx: int) -> tuple[npt.NDArray[np.int64], int]:
        """Votes for each expert of the layer, and those that were cast for the first token after each match.

        Where the layer's turn is still to come, the first vote is for the match itself.
        """
        votes = np.zeros(len(self._chose[layer_idx]), np.int64)
        if self._is_cut or self._num_known < 2:
            return votes, 0
        is_past = layer_idx <= self._last_layer
        of_now = np.float32((1 - BEFORE_SHARE) / self._num_chosen)
        of_before = np.float32(BEFORE_SHARE / self._num_chosen_before if self._num_chosen_before else 0)
        likeness = self._alike.astype(np.float32) * of_now + self._alike_before.astype(np.float32) * of_before
        likeness[~(self._followed if is_past else self._is_known)] = -1
        best = likeness.max()
        if best <= 0:
            return votes, 0
        least = max(best - np.float32(STEPS / STEPS_PER_LIKENESS), np.float32(2.0**-20))
        matches = np.flatnonzero(likeness >= least)
        steps = ((best - likeness[matches]) * np.float32(STEPS_PER_LIKENESS)).astype(np.int64)
        matches, steps = matches[steps < STEPS], steps[steps < STEPS]
        num_within = np.bincount(steps, minlength=STEPS).cumsum()
        last_step = max(0, int(np.searchsorted(num_within, NUM_MATCHES, side="right")) - 1)
        voting = steps <= last_step
        if num_within[0] > NUM_MATCHES:  # of too many equals the latest
            age = (self._now - matches) % NUM_TOKENS
            voting &= age <= np.sort(age[voting])[NUM_MATCHES - 1]
        weights = _WEIGHT[steps[voting]]
        tokens = matches[voting]
        if is_past:
            tokens = (tokens + 1) % NUM_TOKENS
        chosen = self._chosen[layer_idx]
        for token, weight in zip(tokens.tolist(), weights.tolist(), strict=True):
            for share in _SHARE.tolist():
                vote = weight * share // ONE
                if vote < LEAST_VOTE:
                    break
                votes[chosen[token]] += vote
                token = (token + 1) % NUM_TOKENS
                if token == self._now or not self._follows[token]:
                    break
        return votes, int(weights.sum())

    def _begin_token(self) -> None:
        follows = not self._is_cut
        self._is_cut = False
        over, self._now = self._now, (self._now + 1) % NUM_TOKENS
        now = self._now
        for chose, chosen in zip(self._chose, self._chosen, strict=True):
            chose[chosen[now], now] = 0
            chosen[now] = []
        # A token may vote for the next one when that is over.
        if self._has_successor:
            self._followed[over - 1] = True
        self._is_known[over] = self._num_known > 0
        self._is_known[now] = self._followed[now] = False
        self._follows[now] = self._has_successor = follows
        self._follows[(now + 1) % NUM_TOKENS] = False  # the oldest: what it followed on has just been forgotten
        # Before this token and a remembered one were two that were as alike as has been counted so far.
        self._alike_before = np.roll(self._alike, 1)
        self._alike = np.zeros(NUM_TOKENS, np.int16)
        self._num_known = min(self._num_known + 1, NUM_TOKENS)
        self._num_chosen_before = self._num_chosen if follows else 0
        self._num_chosen = 0
