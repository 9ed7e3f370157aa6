"""Routing drawn at random in which consecutive tokens choose the same experts as often as is asked for."""

from collections.abc import Sequence

import numpy as np

from moe_offload.errors import ConfigError
from moe_offload.offload.bench.routing import Experts, Routing, Target

# How often consecutive tokens agree, from Table 5 of the Mixtral paper (Jiang et al. 2024, arXiv 2401.04088) for layers
# 0, 15 and 31 of 32: in the first choice, and in at least one of both. Means over its eight kinds of text, for which
# it gives 13.6-14.9, 23.6-28.4, 19.7-26.3 % and 44.9-49.9, 61.6-67.0, 44.5-53.6 %. Chance: 12.5 and 46 %.
MIXTRAL_DEPTHS = (0.0, 15 / 31, 1.0)
MIXTRAL_FIRST = (0.141, 0.264, 0.227)
MIXTRAL_ANY = (0.480, 0.637, 0.509)


def synthetic_layer(
    num_tokens: int, num_experts: int, top_k: int, *, first: float, share: float, skew: float = 0.0, seed: int = 0
) -> Experts:
    """One layer's choices ``[tokens, top_k]`` with the repetition that `repetition` measures, exactly in expectation.

    ``first``: how often the first choice is that of the token before; ``share``: how often at least one expert is.
    Fresh choices fall on the layer's experts by their popularity, the r-th most popular with weight ``r ** -skew``.
    """
    if not 0 <= first <= share <= 1:
        raise ConfigError(
            f"first={first:g} and any={share:g}: use 0 <= first <= any <= 1, a first choice is one of any"
        )
    if skew < 0:
        raise ConfigError(f"skew={skew:g}; it must be 0 (all alike) or more")
    if top_k == 1 and first != share:
        raise ConfigError("with one expert a token, first= and any= are the same")
    if share < 1 and num_experts < 2 * top_k:
        raise ConfigError(
            f"{top_k} of {num_experts} experts cannot all be others than the {top_k} before; use any=1 or a lower top_k"
        )
    rng = np.random.default_rng(seed)
    # The largest sums of a logarithm of a weight and Gumbel noise are a draw by weight without replacement.
    keys = rng.permutation(-skew * np.log(np.arange(1, num_experts + 1))) + rng.gumbel(size=(num_tokens, num_experts))

    def draw(token: int, count: int, without: Sequence[int]) -> list[int]:
        keys[token, without] = -np.inf
        picked: list[int] = np.argsort(-keys[token])[:count].tolist()
        return picked

    row = draw(0, top_k, [])
    rows = [row]
    for token, chance in enumerate(rng.random(num_tokens - 1), start=1):
        if chance < first:  # the first choice stays
            row = [row[0], *draw(token, top_k - 1, row[:1])]
        elif chance < share:  # one of them stays, but not the first in the first place
            kept = row[int(rng.integers(top_k))]
            others = draw(token, top_k - 1, [kept])
            rank = int(rng.integers(top_k))
            new = [*others[:rank], kept, *others[rank:]]
            if new[0] == row[0]:
                new[0], new[1] = new[1], new[0]
            row = new
        else:
            row = draw(token, top_k, row)
        rows.append(row)
    return np.array(rows, dtype=np.int64)


def mixtral_routing(target: Target, *, seed: int) -> Routing:
    """As many repeated choices as in Mixtral-8x7B, layer by layer, between those of its Table 5 by depth."""
    depths = np.linspace(0, 1, target.num_layers)
    first, share = np.interp(depths, MIXTRAL_DEPTHS, MIXTRAL_FIRST), np.interp(depths, MIXTRAL_DEPTHS, MIXTRAL_ANY)
    return Routing(_layers(target, first.tolist(), share.tolist(), 0.0, seed), None, "synthetic, repeating as Mixtral")


def synthetic_routing(target: Target, *, first: float, share: float, skew: float, seed: int) -> Routing:
    """The same repetition in all layers, see `synthetic_layer`."""
    experts = _layers(target, [first] * target.num_layers, [share] * target.num_layers, skew, seed)
    note = f"synthetic: the first choice repeats {first:.0%}, any of {target.top_k} {share:.0%}, skew {skew:g}"
    return Routing(experts, None, note)


def _layers(target: Target, first: Sequence[float], share: Sequence[float], skew: float, seed: int) -> Experts:
    return np.stack(
        [
            synthetic_layer(
                target.num_tokens,
                target.num_experts,
                target.top_k,
                first=first[layer_idx],
                share=share[layer_idx],
                skew=skew,
                seed=seed * 1000 + layer_idx,
            )
            for layer_idx in range(target.num_layers)
        ],
        axis=1,
    )
