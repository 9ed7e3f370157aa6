"""How near decoding on a GPU comes to what its link and its memory allow, under several caps of VRAM.

    python benchmarks/gpu.py                          # Mixtral-8x7B's shape at 4.25 bits: 25 GB on disk and in RAM
    python benchmarks/gpu.py --caps 8GiB --tokens 32 --variants graphs
    python benchmarks/gpu.py --device cpu --layers 2 --vocab 512 --caps 1GiB     # runs, but measures nothing

Every line is a process of its own, which measures the rates of the link and of the memory before it loads the model.
The bound of a token is the larger of (bytes copied to the device / rate of the link) and (bytes that its kernels read /
rate of the device's memory). One line a cap and routing has every setting at its default; each variant changes one of
them. accelerate offloads the same shape in bf16, which is what it can do.

The table goes to the standard output, all figures to gpu.json beside this script (--output).
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moe_offload.errors import ConfigError, MoeOffloadError
from moe_offload.offload.bench.packs import Shape, synthetic_pack
from moe_offload.offload.pack.manifest import read_manifest
from moe_offload.offload.planning.sizes import format_size, parse_size
from moe_offload.offload.planning.workspace import experts_per_token

CHILDREN = Path(__file__).parent / "gpu_runs"
CAPS = ("8GiB", "12GiB", "16GiB", "24GiB")
ROUTINGS = ("uniform", "trace-like")
VARIANTS = ("miss-path", "prefetch", "graphs", "accelerate")


@dataclass(frozen=True)
class Case:
    """One line."""

    cap: str
    routing: str
    engine: str = "moe-offload"
    miss_path: str = "copy"
    prefetch: str = "auto"
    graphs: str = "auto"

    @property
    def name(self) -> str:
        """For people."""
        if self.engine != "moe-offload":
            return self.engine
        return f"{self.miss_path}, prefetch {self.prefetch}, graphs {self.graphs}"


def cases(caps: Sequence[str], routings: Sequence[str], variants: Sequence[str], device: str) -> Iterator[Case]:
    """Each cap and routing: the defaults, then what differs in one setting."""
    for cap in caps:
        for routing in routings:
            base = Case(cap, routing)
            yield base
            if "miss-path" in variants and device != "cpu":
                yield from (replace(base, miss_path=path) for path in ("cpu", "split", "auto"))
            if "prefetch" in variants:
                yield replace(base, prefetch="off")
            if "graphs" in variants and device != "cpu":
                yield replace(base, prefetch="off", graphs="off")
        if "accelerate" in variants:
            yield Case(cap, "its own", engine="accelerate")


def routing_spec(name: str, num_experts: int, top_k: int) -> str:
    """As the routing is written; drawn evenly, two tokens share what is left to chance."""
    if name != "uniform":
        return "synthetic:mixtral"
    shared = 1 - math.comb(num_experts - top_k, top_k) / math.comb(num_experts, top_k)
    return f"synthetic:first={top_k / num_experts:.4f},any={shared:.4f}"


def run_case(case: Case, settings: dict[str, Any]) -> dict[str, Any]:
    """The figures of one line, or what went wrong."""
    child = "our_child.py" if case.engine == "moe-offload" else "accelerate_child.py"
    job = settings | asdict(case)
    job["routing"] = routing_spec(case.routing, settings["num_experts"], settings["top_k"])
    job["cap_bytes"] = parse_size(case.cap, total_bytes=0, free_bytes=0)
    done = subprocess.run(
        [sys.executable, str(CHILDREN / child)], input=json.dumps(job), capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]}
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def table_line(case: Case, figures: dict[str, Any]) -> str:
    """One line of the table."""
    if "error" in figures:
        return f"| {case.cap} | {case.routing} | {case.name} | {figures['error']} | | | | |"
    if "hit_ratio" not in figures:
        scaled = f" ({figures['layers_measured']} of {figures['layers']} layers)"
        return f"| {case.cap} | {case.routing} | {case.name}{scaled} | {figures['tokens_per_s']:.2f} | | | | |"
    return (
        f"| {case.cap} | {case.routing} | {case.name} | {figures['tokens_per_s']:.2f} | {figures['hit_ratio']:.1%} "
        f"| {format_size(int(figures['bytes_copied_per_token']))} | {figures['link_share']:.0%} "
        f"| {figures['bound_share']:.0%} |"
    )


def device_name(device: str) -> str:
    """What it is; `ConfigError` where there is no GPU."""
    if device == "cpu":
        return "cpu (shows that the benchmark runs; its figures mean nothing)"
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            "this machine, or this build of torch, has no CUDA device: there is nothing to measure; "
            "use --device cpu with a small shape to see the benchmark run"
        )
    return torch.cuda.get_device_name(device)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--caps", nargs="+", default=CAPS, metavar="SIZE")
    parser.add_argument("--routing", nargs="+", default=ROUTINGS, choices=ROUTINGS)
    parser.add_argument("--variants", nargs="*", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--like", default="mixtral-8x7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--experts", type=int)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--format", default="nf4")
    parser.add_argument("--pack", type=Path, help="where the synthetic pack is, or is to be")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--warmup", type=int, default=128)
    parser.add_argument("--accelerate-tokens", type=int, default=8)
    parser.add_argument("--rate-bytes", type=int, default=256 << 20)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args(arguments)
    try:
        name = device_name(options.device)
        numbers = {name: getattr(options, name) for name in ("layers", "experts", "top_k", "vocab")}
        shape = Shape(options.like, format=options.format, **numbers)
        pack = synthetic_pack(shape, options.pack)
        decoder = shape.config().get_text_config(decoder=True)
    except MoeOffloadError as error:
        print(error, file=sys.stderr)
        return 1
    settings = {
        "device": options.device,
        "pack": str(pack),
        "new_tokens": options.tokens,
        "warmup_tokens": options.warmup,
        "accelerate_tokens": options.accelerate_tokens,
        "rate_bytes": options.rate_bytes,
        "vocab_size": decoder.vocab_size,
        "num_experts": read_manifest(pack).layers[0].num_experts,
        "top_k": experts_per_token(decoder),
    }
    print(f"{shape.name} on {name}\n")
    print("| cap | routing | setting | tok/s | hits | copied a token | link in use | of the bound |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    lines = []
    for case in cases(options.caps, options.routing, options.variants, options.device):
        figures = run_case(case, settings)
        lines.append({"case": asdict(case), "figures": figures})
        print(table_line(case, figures), flush=True)
        options.output.write_text(json.dumps({"device": name, "settings": settings, "lines": lines}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
