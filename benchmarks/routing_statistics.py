"""Writes offload/forecast/routing_statistics.json: how often models ask again for experts that a cache still holds.

    python benchmarks/routing_statistics.py --traces FOLDER

Replays recorded routing (an .npz with ``experts``, ``sequence`` and ``phase``, and a .json beside it that says where it
is from) under the default policy, and Mixtral's as its paper describes it. An event is one token at one layer; the
cache lives on across sequences; the first use of an expert counts as a miss. The spread is the standard deviation
between sequences.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_offload.cache import DEFAULT_POLICY, RoutingTrace
from moe_offload.offload.bench.routing import Target
from moe_offload.offload.bench.synthetic_routing import mixtral_routing
from moe_offload.offload.forecast.hit_ratio import STATISTICS
from moe_offload.offload.forecast.trace_hits import hit_ratio, slots_at_shares

# What the recorded models are called, by the beginning of a trace's name: preset, architecture.
MODELS = {
    "gpt-oss-20b": ("gpt-oss-20b", "gpt_oss"),
    "gpt-oss-120b": ("gpt-oss-120b", "gpt_oss"),
    "deepseek-v2-lite": ("deepseek-v2-lite", "deepseek_v2"),
    "olmoe-1b-7b": ("olmoe-1b-7b", "olmoe"),
}
# Sequences in which the model repeats itself over and over flatter any cache.
LEFT_OUT = {"gpt-oss-120b": (0, 2)}
MIXTRAL_TOKENS = 1500


def points(experts: Any, sequence: Any, num_experts: int) -> list[dict[str, float]]:
    """The statistic of ``experts [tokens, layers, top_k]`` at every size."""
    part = np.unique(sequence, return_inverse=True)[1]
    trace = RoutingTrace(
        experts=experts, sequence=part, num_experts=np.full(experts.shape[1], num_experts, dtype=np.int32)
    )
    found = []
    for num_slots in slots_at_shares(num_experts):
        ratio, spread = hit_ratio(trace, num_slots, part)
        found.append({"slots": num_slots, "hit_ratio": round(ratio, 4), "spread": round(spread, 4)})
        print(f"  {num_slots} of {num_experts}: {ratio:.1%} +- {spread:.1%}", file=sys.stderr)
    return found


def recorded(path: Path, preset: str, model_type: str) -> dict[str, Any]:
    """One trace."""
    about = json.loads(path.with_suffix(".json").read_text())
    arrays = np.load(path)
    experts, sequence = arrays["experts"], arrays["sequence"]
    wanted = (arrays["phase"] == 1) & ~np.isin(sequence, LEFT_OUT.get(preset, ()))
    experts, sequence = experts[wanted], sequence[wanted]
    return {
        "name": preset,
        "model_type": model_type,
        "experts": about["num_experts"],
        "top_k": experts.shape[2],
        "layers": experts.shape[1],
        "tokens": len(experts),
        "sequences": len(np.unique(sequence)),
        "source": f"{about['source'].replace('github:', 'https://github.com/')} at {about['commit']}",
        "licence": about["licence"],
        "workload": about["workload"],
        "points": points(experts, sequence, about["num_experts"]),
    }


def mixtral() -> dict[str, Any]:
    """Mixtral-8x7B, of which no trace is published: drawn with the repetition that its paper measured."""
    target = Target(MIXTRAL_TOKENS, 32, 8, 2)
    routing = mixtral_routing(target, seed=0)
    sequence = np.arange(MIXTRAL_TOKENS) // 300
    return {
        "name": "mixtral-8x7b",
        "model_type": "mixtral",
        "experts": 8,
        "top_k": 2,
        "layers": 32,
        "tokens": MIXTRAL_TOKENS,
        "sequences": 5,
        "source": "drawn at random with the repetition of Table 5 of arXiv 2401.04088: what lasts longer than a token "
        "is missing, so real text may hit more often",
        "licence": "-",
        "workload": "mean of the eight kinds of text of the table",
        "points": points(routing.experts, sequence, 8),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Replay everything and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True, help="folder with the .npz files")
    folder = parser.parse_args(arguments).traces
    models = []
    for path in sorted(folder.glob("*.npz")):
        known = next((value for stem, value in MODELS.items() if path.stem.startswith(stem)), None)
        if known is None:
            print(f"{path.name}: not a model that is known here", file=sys.stderr)
            continue
        print(path.stem, file=sys.stderr)
        models.append(recorded(path, *known))
    models.append(mixtral())
    STATISTICS.write_text(json.dumps({"schema": 1, "policy": DEFAULT_POLICY, "models": models}, indent=1) + "\n")


if __name__ == "__main__":
    main()
