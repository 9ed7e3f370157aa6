"""Replay: token-layer events a second, by policy, and the whole LRU curve in one pass.

    python benchmarks/bench_replay.py [--experts 64] [--top-k 4,8] [--tokens 40000] [--layers 26]

The routing is synthetic, with favourites that drift, so that hits are about as frequent as in recorded traces. An event
is one token at one layer. Each figure is the best of three; a replay is one pass at one size, the LRU curve one pass
for all sizes. Putting the events of a trace together comes once before, and is timed by itself.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
from kernel_timing import machine, print_table

from moe_offload.cache import RoutingTrace
from moe_offload.cache.replay import replay, replay_policies
from moe_offload.cache.replay_curves import lru_curve
from moe_offload.cache.replay_events import events_of


def drifting_trace(num_tokens: int, num_layers: int, num_experts: int, top_k: int) -> RoutingTrace:
    """Experts drawn without repetition, by preferences that change a little from token to token."""
    rng = np.random.default_rng(0)
    experts = np.empty((num_tokens, num_layers, top_k), np.int16)
    likes = rng.normal(size=(num_layers, num_experts))
    for token in range(num_tokens):
        likes = 0.98 * likes + 0.2 * rng.normal(size=likes.shape)
        drawn = 1.5 * likes + rng.gumbel(size=likes.shape)
        experts[token] = np.argpartition(-drawn, top_k, axis=1)[:, :top_k]
    return RoutingTrace(experts=experts)


def best_s(call: Callable[[], object]) -> float:
    """The least of three: what else runs here can only add to a time."""
    times = []
    for _ in range(3):
        begin_s = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin_s)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", default="4,8")
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--layers", type=int, default=26)
    arguments = parser.parse_args()
    print(machine())
    rows = []
    for top_k in map(int, arguments.top_k.split(",")):
        trace = drifting_trace(arguments.tokens, arguments.layers, arguments.experts, top_k)
        num_events = arguments.tokens * arguments.layers

        def add(
            what: str, slots: str, hits: str, call: Callable[[], object], top_k: int = top_k, num: int = num_events
        ) -> None:
            spent_s = best_s(call)
            rows.append((str(top_k), what, slots, hits, f"{num / spent_s / 1e6:.1f}", f"{spent_s / num * 1e9:.0f}"))

        begin_s = time.perf_counter()
        events_of(trace)
        spent_s = time.perf_counter() - begin_s
        rows.append((str(top_k), "events put together", "", "", f"{num_events / spent_s / 1e6:.1f}", ""))
        for share in (4, 2):
            num_slots = arguments.experts // share
            for policy in replay_policies():
                ratio = replay(trace, policy=policy, num_slots=num_slots).hit_ratio()
                add(
                    policy,
                    str(num_slots),
                    f"{ratio:.1%}",
                    lambda policy=policy, trace=trace, num_slots=num_slots: replay(
                        trace, policy=policy, num_slots=num_slots
                    ),
                )
            pool_slots = num_slots * arguments.layers
            ratio = replay(trace, policy="lru", pool_slots=pool_slots).hit_ratio()
            add(
                "lru, one pool",
                str(pool_slots),
                f"{ratio:.1%}",
                lambda trace=trace, pool_slots=pool_slots: replay(trace, policy="lru", pool_slots=pool_slots),
            )
        add("lru, all sizes", f"{top_k} to {arguments.experts}", "", lambda trace=trace: lru_curve(trace))
    print_table(("top-k", "policy", "slots", "hits", "M events/s", "ns an event"), rows)


if __name__ == "__main__":
    main()
