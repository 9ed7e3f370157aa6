"""What ``--miss-path auto`` costs against the best fixed path in short runs: simulated machines, the same every time.

A step of 16 layers takes a second, and each of its misses what its path takes on that machine; steps miss differently
much, vary by 5 %, and one in 500 takes thirty times as long as it should. ``python benchmarks/miss_path_regret.py``
prints the table of docs/tiers.md: the time of ``auto`` over that of the best fixed path, mean and worst of 20 seeds.
"""

import random
import statistics

from moe_offload.offload.experts.miss_path import AUTO_ORDER, COPY, CPU, SPLIT
from moe_offload.offload.experts.step_tuning import StepTuner

NUM_LAYERS = 16
RUN_TOKENS = (16, 32, 64, 128, 512)
SEEDS = range(20)
# Seconds that a miss takes on each path.
MACHINES = {
    "split is best, copy is close": {COPY: 0.05, CPU: 0.10, SPLIT: 0.045},
    "split is twice as fast": {COPY: 0.10, CPU: 0.10, SPLIT: 0.05},
    "the CPU is best": {COPY: 0.10, CPU: 0.04, SPLIT: 0.06},
    "copy is best, the CPU close": {COPY: 0.05, CPU: 0.051, SPLIT: 0.06},
    "a CPU forty times as slow as the link": {COPY: 0.02, CPU: 0.80, SPLIT: 0.021},
    "a link forty times as slow as the CPU": {COPY: 0.80, CPU: 0.02, SPLIT: 0.021},
    "misses cost next to nothing": {COPY: 0.001, CPU: 0.001, SPLIT: 0.001},
}
Step = list[tuple[int, float]]


def draw_steps(num_steps: int, seed: int) -> list[Step]:
    """Of each step, layer by layer, how many misses it has and how much longer than it should it takes."""
    draw = random.Random(seed)
    steps = []
    for _ in range(num_steps):
        factor = 30.0 if draw.random() < 0.002 else 1.0
        steps.append([(draw.choice([0, 0, 1, 2]), factor * draw.uniform(0.95, 1.05)) for _ in range(NUM_LAYERS)])
    return steps


def layer_s(miss_s: dict[str, float], path: str, num_missed: int, factor: float) -> float:
    """One layer's seconds."""
    return factor * (1 / NUM_LAYERS + num_missed * miss_s[path])


def fixed_s(miss_s: dict[str, float], path: str, steps: list[Step]) -> float:
    """A run's seconds with one path."""
    return sum(layer_s(miss_s, path, *layer) for step in steps for layer in step)


def tuned_s(miss_s: dict[str, float], steps: list[Step]) -> float:
    """A run's seconds with ``auto``."""
    tuner, total_s = StepTuner(AUTO_ORDER, fallback=COPY), 0.0
    for step in steps:
        elapsed_s = 0.0
        for layer in step:
            elapsed_s += layer_s(miss_s, tuner.setting_after(elapsed_s), *layer)
        tuner.record(elapsed_s, sum(num_missed for num_missed, _ in step))
        total_s += elapsed_s
    return total_s


def regrets(miss_s: dict[str, float], num_tokens: int) -> list[float]:
    """By how much of the best fixed path's time ``auto`` takes longer, seed by seed."""
    found = []
    for seed in SEEDS:
        steps = draw_steps(num_tokens, seed)
        best_s = min(fixed_s(miss_s, path, steps) for path in miss_s)
        found.append(tuned_s(miss_s, steps) / best_s - 1)
    return found


def table() -> list[str]:
    """The lines of the table."""
    lines = ["| machine | " + " | ".join(f"{tokens} tokens" for tokens in RUN_TOKENS) + " |"]
    lines.append("| --- |" + " --- |" * len(RUN_TOKENS))
    for name, miss_s in MACHINES.items():
        cells = []
        for num_tokens in RUN_TOKENS:
            found = regrets(miss_s, num_tokens)
            cells.append(f"{statistics.mean(found):.1%} ({max(found):.1%})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
