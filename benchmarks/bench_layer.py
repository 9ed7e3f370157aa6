"""A decode step through the experts of one layer, all resident: bytes read a second, and what a call costs by itself.

    python benchmarks/bench_layer.py [--formats nf4,int4] [--shapes mixtral-8x7b]

The layer runs as in a model: cache, slots, one call of kernels, weighted sum. Tokens take turns at more experts than
processor caches hold, and the packed bytes they read a second stand beside the bandwidth of plain reading measured in
the same run. The overhead is what a token takes through experts of 64 x 64, in us.
"""

import argparse
from collections.abc import Callable

import torch
from kernel_timing import PIECE_BYTES, machine, print_table, readings, seconds, seconds_in_turns

from moe_offload.cache import ExpertCache
from moe_offload.offload.experts.layer import ExpertLayer, StepState
from moe_offload.offload.experts.residency import Residency
from moe_offload.offload.experts.weights import ExpertWeights, MlpParts, PartLayout
from moe_offload.offload.pack.manifest import PartSpec
from moe_offload.offload.tiers.compute_tier import Done, Transfer
from moe_offload.quant import get_format
from moe_offload.quant.activation import Activation

SWIGLU = Activation("sigmoid")
# name -> hidden, intermediate, top_k, activation
SHAPES = {
    "mixtral-8x7b": (4096, 14336, 2, SWIGLU),
    "qwen3-30b-a3b": (2048, 768, 8, SWIGLU),
    "gpt-oss-20b": (2880, 2880, 4, Activation("sigmoid", "interleaved", 1.702, 7.0, up_limit=7.0, up_shift=1.0)),
}
TINY = {"top-2": (64, 64, 2, SWIGLU), "top-8": (64, 64, 8, SWIGLU)}
FORMATS = ("nf4", "int4", "nf3", "int8", "mxfp4", "bf16")
SLOTS_BYTES = 768 << 20
ROUNDS = 5


class Slots:
    """A tier whose experts are there as soon as they are asked for."""

    num_staging_slots = 0
    bytes_read = bytes_copied = 0
    lender = None

    def __init__(self, layout: PartLayout, slots: torch.Tensor) -> None:
        self._weights = [ExpertWeights(layout, slot) for slot in slots]

    def begin(self, layer_idx: int, expert_idx: int, slot: int, *, speculative: bool, done: Done) -> Transfer | None:
        """Nothing to wait for."""
        done(None)

    def slab(self, layer_idx: int) -> None:
        """The CPU computes."""

    def use(self, layer_idx: int, slot: int) -> ExpertWeights:
        """The expert in a slot."""
        return self._weights[slot]

    def used(self, layer_idx: int, slot: int) -> None:
        """Nothing to order."""

    def close(self) -> None:
        """Nothing to stop."""


class Layer:
    """One layer with experts of one shape and format, all in their slots."""

    def __init__(self, spec: str, shape: tuple[int, int, int, Activation], slots_bytes: int) -> None:
        hidden, inner, self.top_k, activation = shape
        torch.manual_seed(0)
        fmt = get_format(spec)
        shapes = {"gate_up_proj": (2 * inner, hidden), "down_proj": (hidden, inner)}
        packed = {name: fmt.quantize((torch.randn(shape) * 0.02).bfloat16()) for name, shape in shapes.items()}
        parts, end = [], 0
        for name, data in packed.items():
            parts.append(PartSpec(name, shapes[name], spec, end, data.numel()))
            end += data.numel()
        self.expert_bytes = end
        self.num_experts = max(2 * self.top_k, slots_bytes // end // self.top_k * self.top_k)
        self.slots = torch.cat(list(packed.values())).expand(self.num_experts, -1).contiguous()
        self._parts = MlpParts(("gate_up_proj",), "down_proj", activation)
        self._activation = activation
        tier = Slots(PartLayout(parts), self.slots)
        cache = ExpertCache([self.num_experts], [self.num_experts])
        self.layer = ExpertLayer(0, self.num_experts, Residency(cache, tier), StepState())
        self.x = torch.randn(1, hidden).bfloat16()
        self.weights = torch.full((1, self.top_k), 1 / self.top_k)

    def _expert(self, weights: ExpertWeights, x: torch.Tensor) -> torch.Tensor:
        return weights.linear("down_proj", self._activation(weights.linear("gate_up_proj", x)))

    def steps(self, *, one_call: bool = True) -> list[Callable[[], object]]:
        """A token for each ``top_k`` experts."""
        parts = self._parts if one_call else None
        tokens = torch.arange(self.num_experts).view(-1, 1, self.top_k)
        return [lambda ids=ids: self.layer.routed(self.x, ids, self.weights, self._expert, parts) for ids in tokens]


def measure(spec: str, shape: tuple[int, int, int, Activation]) -> tuple[str, ...]:
    """One row of the table of rates."""
    layer = Layer(spec, shape, SLOTS_BYTES)
    steps, apart = (layer.steps(one_call=one_call) for one_call in (True, False))
    step_s, apart_s, read_s = seconds_in_turns(steps, apart, readings(layer.slots), rounds=ROUNDS)
    read = PIECE_BYTES / read_s
    rate = layer.top_k * layer.expert_bytes / step_s
    return (
        f"{step_s * 1e3:.3f}",
        f"{rate / 1e9:.1f}",
        f"{rate / read:.0%}",
        f"{read / 1e9:.1f}",
        f"{apart_s / step_s:.2f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--shapes", default=",".join(SHAPES))
    arguments = parser.parse_args()
    formats = arguments.formats.split(",")
    print(machine())
    print()
    with torch.inference_mode():
        rows = [(name, spec, *measure(spec, SHAPES[name])) for name in arguments.shapes.split(",") for spec in formats]
        header = ("experts", "format", "ms", "packed GB/s", "of plain read", "plain read GB/s", "x one by one")
        print_table(header, rows)
        print()
        rows = []
        for name, shape in TINY.items():
            layer = Layer("nf4", shape, 0)
            calls_us = [
                f"{seconds(layer.steps(one_call=one_call), rounds=500) * 1e6:.0f}" for one_call in (True, False)
            ]
            rows.append((name, *calls_us))
        print_table(("tiny experts", "one call, us", "one by one, us"), rows)


if __name__ == "__main__":
    main()
