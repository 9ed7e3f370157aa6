"""How much of what a layer will ask for can be told before its router: the table of predictors in docs/policies.md.

At every token and layer, what the layers before it chose and all that earlier tokens chose is known, and nothing of
the model: no weight, no hidden state. Scored are the texts that benchmarks/policies.py scores, from nothing known on.
Recall at n is the share of the chosen experts that are among the n likeliest, for n as many as a token chooses and
twice as many.

    python benchmarks/predictors.py TRACE...
"""

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
from policies import halves, known_sizes

from moe_offload.cache import RoutingTrace, make_policy, read_trace

KEPT = 0.5 ** (1 / 24)  # of a count, an event later
TABLE_KEPT = 0.98  # of a row of the table, each time that it is added to
LAST_TOKEN = 0.1  # what a choice of the last token adds to the table's probability
LIKENESS = 1.0  # what a doubling of the table's probability adds to the scores of `RecallPolicy`
NAMES = ("frequency", "last token", "layer table", "last token + table", "recall", "recall + table")
Floats = npt.NDArray[np.float64]


class Tables:
    """For each layer, how often each of its experts came with each expert of the layer before; learnt as it goes."""

    def __init__(self, sizes: list[int]) -> None:
        self._counts = [np.zeros((sizes[layer_idx - 1], size)) for layer_idx, size in enumerate(sizes)]
        self._totals = [np.zeros(sizes[layer_idx - 1]) for layer_idx in range(len(sizes))]

    def probabilities(self, layer_idx: int, before: list[int], prior: Floats) -> Floats:
        """Of each expert, given what the layer before has chosen: a mean over it, of counts beside ``prior``."""
        counts, totals = self._counts[layer_idx][before], self._totals[layer_idx][before, None]
        mean: Floats = ((counts + prior) / (totals + 1)).mean(0)
        return mean

    def add(self, layer_idx: int, before: list[int], chosen: list[int]) -> None:
        self._counts[layer_idx][before] *= TABLE_KEPT
        self._counts[layer_idx][np.ix_(before, chosen)] += 1
        self._totals[layer_idx][before] = self._totals[layer_idx][before] * TABLE_KEPT + 1


def recalls(trace: RoutingTrace, sizes: list[int]) -> Floats:
    """[predictors, 2]: at as many as a token chooses, and at twice as many; the first layer of a token left out."""
    num_layers, top_k = trace.num_layers, trace.top_k
    counts = [np.zeros(size) for size in sizes]
    tables, policy = Tables(sizes), make_policy("recall", sizes)
    found, asked = np.zeros((len(NAMES), 2)), 0
    last: list[list[int]] = [[] for _ in sizes]
    texts = np.zeros(trace.num_tokens) if trace.sequence is None else trace.sequence
    for token, by_layer in enumerate(trace.experts.tolist()):
        if token and texts[token] != texts[token - 1]:
            policy.new_sequence()
            last = [[] for _ in sizes]
        before: list[int] = []
        for layer_idx in range(num_layers):
            chosen = [expert_idx for expert_idx in by_layer[layer_idx] if expert_idx >= 0]
            if before:
                rate = (counts[layer_idx] + 1e-3) / (counts[layer_idx].sum() + 1e-3 * sizes[layer_idx])
                was_last = np.zeros(sizes[layer_idx])
                was_last[last[layer_idx]] = 1 - np.arange(len(last[layer_idx])) / 100
                table = tables.probabilities(layer_idx, before, rate * top_k)
                recalled = np.array(policy.scores(layer_idx))
                scores = (
                    rate,
                    was_last + rate / 1e3,
                    table,
                    table + LAST_TOKEN * was_last,
                    recalled,
                    recalled + LIKENESS * np.log2(table / top_k * sizes[layer_idx] + 0.03),
                )
                for row, score in enumerate(scores):
                    order = np.argsort(-score, kind="stable")
                    found[row, 0] += np.isin(chosen, order[:top_k]).sum()
                    found[row, 1] += np.isin(chosen, order[: 2 * top_k]).sum()
                asked += len(chosen)
                tables.add(layer_idx, before, chosen)
            counts[layer_idx] *= KEPT
            counts[layer_idx][chosen] += 1
            policy.touch(layer_idx, chosen, None)
            last[layer_idx] = before = chosen
    return found / asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE")
    print("| trace | " + " | ".join(NAMES) + " |")
    print("| --- " * (len(NAMES) + 1) + "|")
    for path in parser.parse_args().traces:
        trace = read_trace(path)
        cells = (f"{at_k:.1%} / {at_2k:.1%}" for at_k, at_2k in recalls(halves(trace)[1], known_sizes(trace)))
        print(f"| {path.stem} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
