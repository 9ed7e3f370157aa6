"""What a policy costs: CPU time of `touch` and of `scores`, an event of a layer, as the running cache calls them.

python benchmarks/bench_policy.py [TRACE]
"""

import argparse
import time
from pathlib import Path

import numpy as np

from moe_offload.cache import RoutingTrace, make_policy, policy_names, read_trace
from moe_offload.cache.learned import LearnedWeights, make_learned_policy

SHAPES = ((8, 2, 32), (32, 4, 24), (64, 8, 16), (128, 8, 48), (256, 8, 58))  # experts, chosen by a token, layers
WIDTH = 48
NUM_TOKENS = 2500  # the history of `recall` is full before the end


def random_trace(num_experts: int, top_k: int, num_layers: int) -> RoutingTrace:
    """Words of a vocabulary of 500 in random order, each with routing of its own."""
    rng = np.random.default_rng(0)
    words = np.argsort(rng.random((500, num_layers, num_experts)), axis=2)[..., :top_k]
    return RoutingTrace(
        experts=words[rng.integers(500, size=NUM_TOKENS)].astype(np.int16),
        num_experts=np.full(num_layers, num_experts, np.int32),
    )


def random_weights(sizes: list[int]) -> LearnedWeights:
    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.float32)

    tables = tuple(zeros(n, WIDTH) for n in sizes)
    return LearnedWeights(
        zeros(WIDTH), tables, tables, tuple(zeros(WIDTH, n) for n in sizes), tuple(zeros(n) for n in sizes)
    )


def measure(name: str, trace: RoutingTrace, sizes: list[int]) -> tuple[float, float]:
    """Microseconds of `touch` and of `scores`, from Python, over the second half of the trace."""
    policy = make_learned_policy(random_weights(sizes)) if name == "learned" else make_policy(name, sizes)
    tokens = [[[e for e in chosen if e >= 0] for chosen in token] for token in trace.experts.tolist()]
    half = len(tokens) // 2
    for token in tokens[:half]:
        for layer_idx, chosen in enumerate(token):
            policy.touch(layer_idx, chosen, None)
    touch_s = both_s = 0.0
    for token in tokens[half:]:
        begin_s = time.process_time()
        for layer_idx, chosen in enumerate(token):
            policy.touch(layer_idx, chosen, None)
        middle_s = time.process_time()
        for layer_idx in range(len(token)):
            policy.scores(layer_idx)
        touch_s += middle_s - begin_s
        both_s += time.process_time() - begin_s
    num_events = (len(tokens) - half) * len(sizes)
    return touch_s / num_events * 1e6, (both_s - touch_s) / num_events * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", nargs="?", type=Path, help="recorded routing instead of random shapes")
    given = parser.parse_args().trace
    traces = {f"{e} experts, {k} a token, {layers} layers": random_trace(e, k, layers) for e, k, layers in SHAPES}
    if given is not None:
        traces = {given.stem: read_trace(given)}
    names = (*policy_names(), "learned")
    print("| routing | " + " | ".join(f"{name}: touch + scores, us" for name in names) + " |")
    print("| --- " * (len(names) + 1) + "|")
    for title, trace in traces.items():
        sizes = (
            [int(trace.experts.max()) + 1] * trace.num_layers if trace.num_experts is None else list(trace.num_experts)
        )
        cells = ("{:.2f} + {:.2f}".format(*measure(name, trace, [int(n) for n in sizes])) for name in names)
        print(f"| {title} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
