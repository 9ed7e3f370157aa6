"""The policy that recalls what came after tokens like this one: its history, and the library against Python."""

import random

import numpy as np
import pytest

from moe_offload.cache import kernels
from moe_offload.cache.native_policy import NativePolicy
from moe_offload.cache.recall import RecallPolicy
from moe_offload.cache.token_history import NUM_MATCHES, NUM_TOKENS, ONE, TokenHistory


def text(seed: int, num_tokens: int, num_layers: int, num_experts: int, top_k: int) -> list[list[list[int]]]:
    """Tokens of a small vocabulary, each with routing of its own and a little noise."""
    rng = random.Random(seed)
    words = [[rng.sample(range(num_experts), top_k) for _ in range(num_layers)] for _ in range(40)]
    tokens = []
    for _ in range(num_tokens):
        word = [list(experts) for experts in rng.choice(words[: num_experts * num_experts // 2])]
        if rng.random() < 0.3:
            word[rng.randrange(num_layers)] = rng.sample(range(num_experts), rng.randint(1, top_k))
        tokens.append(word)
    return tokens


@pytest.mark.skipif(kernels.library() is None, reason="the library was not built")
@pytest.mark.parametrize(("num_experts", "top_k", "num_tokens"), [(4, 1, 2300), (40, 6, 300)])
def test_the_library_gives_the_scores_of_the_reference(num_experts: int, top_k: int, num_tokens: int):
    sizes = [num_experts] * 3
    native, reference = NativePolicy("recall", sizes), RecallPolicy(sizes)
    rng = random.Random(5)
    for at, token in enumerate(text(3, num_tokens, 3, num_experts, top_k)):
        for layer_idx, experts in enumerate(token):
            for policy in (native, reference):
                policy.touch(layer_idx, experts, None)
            if num_tokens < 500 or at % 100 == 0 or at > num_tokens - 20:
                asked = rng.randrange(3)
                assert list(native.scores(asked)) == list(reference.scores(asked))
        if rng.random() < 0.02:
            prompt = rng.sample(range(num_experts), num_experts - 1)
            weights = sorted((rng.random() for _ in prompt), reverse=True)
            for policy in (native, reference):
                policy.new_sequence()
                policy.touch(1, prompt, weights)


def test_what_followed_the_same_tokens_is_foreseen():
    history = TokenHistory([6, 6])
    for experts in ([0, 1], [2, 3], [4, 5], [0, 1], [2, 3]):
        for layer_idx in range(2):
            history.add(layer_idx, experts)
    votes, num_cast = history.vote(0)
    assert num_cast == ONE
    assert votes.tolist() == [votes[0], votes[0], votes[2], votes[2], ONE, ONE]
    assert ONE > votes[0] > 0 == votes[2]  # [0, 1] comes after [4, 5]; the [2, 3] after that is under way


def test_a_layer_whose_turn_is_to_come_is_foreseen_from_the_match_itself():
    history = TokenHistory([6, 6])
    for experts in ([0, 1], [2, 3], [4, 5]):
        for layer_idx in range(2):
            history.add(layer_idx, experts)
    history.add(0, [2, 3])
    votes, _ = history.vote(1)
    assert votes.tolist() == [0, 0, ONE, ONE, 3 * ONE // 4, 3 * ONE // 4]


def test_nothing_is_foreseen_across_texts():
    history = TokenHistory([6])
    history.add(0, [0])
    history.cut()
    history.add(0, [1])
    history.add(0, [0])
    votes, num_cast = history.vote(0)
    assert (votes.sum(), num_cast) == (0, 0)
    history.cut()
    assert history.vote(0)[1] == 0


def test_old_tokens_are_forgotten():
    history = TokenHistory([4])
    history.add(0, [0])
    history.add(0, [1])
    for _ in range(NUM_TOKENS - 2):
        history.add(0, [2])
    history.add(0, [0])
    votes, num_cast = history.vote(0)
    assert votes[1] == 0 < votes[2]
    assert num_cast == NUM_MATCHES * ONE


def test_a_prompt_leaves_its_shares():
    policy = RecallPolicy([8])
    policy.touch(0, [0], None)
    policy.touch(0, [1], None)
    policy.touch(0, [2, 3, 4, 5, 6], [0.5, 0.4, 0.3, 0.2, 0.1])
    scores = np.array(policy.scores(0))
    assert scores[2] > scores[3] > scores[4] > scores[5] > scores[6] > 0 == scores[7]


def test_an_expert_never_used_is_behind_all_others():
    policy = RecallPolicy([4])
    policy.touch(0, [0], None)
    for _ in range(5000):
        policy.touch(0, [1], None)
    scores = policy.scores(0)
    assert scores[1] > scores[0] > 0 == scores[2] == scores[3]
