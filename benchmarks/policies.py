"""How far each policy goes from LRU to Belady's optimum on recorded routing: the table of docs/policies.md.

Every trace is split by texts: the first, third, fifth ... may be used to tune a policy and to fit a predictor, the
others are scored, from a cold cache on. A trace of one text is split in the middle. An event is one token at one layer,
whose own experts stay; each layer has its own slots; first uses count as misses.

    python benchmarks/policies.py [--learn] TRACE...
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from moe_offload.cache import RoutingTrace, read_trace
from moe_offload.cache.replay import BELADY, MakePolicy, replay, replay_policies, share_of_slots
from moe_offload.cache.replay_events import events_of
from moe_offload.offload.learning.examples import examples_of, select, split
from moe_offload.offload.learning.learn import APART, replace_sizes
from moe_offload.offload.learning.network import fit

SHARES = (0.25, 0.5)


def halves(trace: RoutingTrace) -> tuple[RoutingTrace, RoutingTrace]:
    """The half to tune on, and the half to score."""
    texts = np.zeros(trace.num_tokens) if trace.sequence is None else trace.sequence
    rank = np.cumsum(np.concatenate([[False], np.diff(texts) != 0]))
    if rank[-1] == 0:
        rank = np.arange(trace.num_tokens) * 2 // trace.num_tokens
    return select(trace, rank % 2 == 0), select(trace, rank % 2 == 1)


def known_sizes(trace: RoutingTrace) -> list[int]:
    """Experts of each layer; where the trace does not tell, of a power of two that holds all that it names."""
    if trace.num_experts is not None:
        return [int(n) for n in trace.num_experts]
    return [1 << int(trace.experts.max()).bit_length()] * trace.num_layers


def learned_policy(trace: RoutingTrace, sizes: Sequence[int]) -> MakePolicy:
    """A predictor fitted to the half that is not scored."""
    from moe_offload.cache.learned import make_learned_policy

    kept, apart = split([trace], APART)
    weights = fit(examples_of(kept, sizes), examples_of(apart, sizes), sizes, lambda epoch, loss: None)
    return lambda num_experts: make_learned_policy(weights)


def score(trace: RoutingTrace, policies: dict[str, str | MakePolicy], share: float) -> dict[str, tuple[float, float]]:
    """Of each policy the hit ratio, and the CPU microseconds that an event of the replay took."""
    num_events = events_of(trace, "token").num_events
    found = {}
    for name, policy in policies.items():
        begin_s = time.process_time()
        result = replay(trace, policy=policy, num_slots=share_of_slots(trace, share), counting="token")
        found[name] = (result.hit_ratio(), (time.process_time() - begin_s) / num_events * 1e6)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE")
    parser.add_argument("--learn", action="store_true", help="fit a predictor to each trace's other half, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = [name for name in replay_policies() if name not in ("lru", BELADY)]
    names += ["learned"] if options.learn else []
    closed: dict[str, list[float]] = {name: [] for name in names}
    print("| trace | resident | LRU | " + " | ".join(names) + " | Belady |")
    print("| --- " * (len(names) + 4) + "|")
    for path in options.traces:
        trace = read_trace(path)
        sizes = known_sizes(trace)
        tuned, held_out = (replace_sizes(half, sizes) for half in halves(trace))
        policies: dict[str, str | MakePolicy] = {name: name for name in ("lru", *names, BELADY)}
        if options.learn:
            policies["learned"] = learned_policy(tuned, sizes)
        for share in SHARES:
            found = score(held_out, policies, share)
            lru, best = found["lru"][0], found[BELADY][0]
            cells = []
            for name in names:
                if best > lru:  # else slots for one token's experts: there is nothing to choose
                    closed[name].append((found[name][0] - lru) / (best - lru))
                way = f"{closed[name][-1]:.2f}" if best > lru else "-"
                cells.append(f"{found[name][0] * 100:.2f} ({way}; {found[name][1]:.1f} us)")
            print(
                f"| {path.stem} | {share:.0%} | {lru * 100:.2f} | {' | '.join(cells)} | {best * 100:.2f} |", flush=True
            )
    print("| mean | | | " + " | ".join(f"({np.mean(closed[name]):.3f})" for name in names) + " | |")


if __name__ == "__main__":
    main()
