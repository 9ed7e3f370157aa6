"""How fast a checkpoint becomes a pack, end to end: read, converted, quantised, checksummed, written.

The checkpoint is one layer in the shape of Mixtral-8x7B, in bf16 (2.8 GB), just written, so mostly in the page cache:
the figure is what the software can do; a slower disk is its own bound.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import MixtralConfig

CHILD = """
import json, sys, time
from pathlib import Path
import moe_offload  # before torch, as the command line has it
import transformers
transformers.logging.set_verbosity_error()
from moe_offload.offload.planning.memory import peak_rss_bytes, reset_peak_rss, rss_bytes
from moe_offload.offload.pack.packer import pack_model
base_bytes = rss_bytes(); reset_peak_rss()
begin_s = time.perf_counter()
pack_model(sys.argv[1], Path(sys.argv[2]), format=sys.argv[3])
print(json.dumps([time.perf_counter() - begin_s, peak_rss_bytes() - base_bytes]))
"""


def write_checkpoint(folder: Path, config: MixtralConfig) -> int:
    """One shard a layer, random; returns the number of weights."""
    config.save_pretrained(folder)
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    kv_size = hidden // config.num_attention_heads * config.num_key_value_heads
    weight_map: dict[str, str] = {}
    num_weights = 0
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        shapes: dict[str, tuple[int, ...]] = {
            f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}.self_attn.k_proj.weight": (kv_size, hidden),
            f"{prefix}.self_attn.v_proj.weight": (kv_size, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.block_sparse_moe.gate.weight": (config.num_local_experts, hidden),
        }
        for expert in range(config.num_local_experts):
            for name, shape in {"w1": (inner, hidden), "w2": (hidden, inner), "w3": (inner, hidden)}.items():
                shapes[f"{prefix}.block_sparse_moe.experts.{expert}.{name}.weight"] = shape
        if layer == 0:
            shapes |= {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
            shapes["model.norm.weight"] = (hidden,)
        noise = torch.randn(1 << 22, dtype=torch.float32).mul_(0.02).to(torch.bfloat16)
        tensors = {}
        for key, shape in shapes.items():
            count = torch.Size(shape).numel()
            tensors[key] = noise.repeat(-(-count // noise.numel()))[:count].reshape(shape)
            num_weights += count
        name = f"model-{layer:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return num_weights


def main() -> None:
    """Print a Markdown table with a row a format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--formats", default="nf4,int4,int8,mxfp4,fp8,bf16")
    arguments = parser.parse_args()

    from moe_offload.quant import backend_name

    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"kernels {backend_name()}\n\n"
        "| format | weights | time, s | M weights/s | peak memory, MiB |\n|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        config = MixtralConfig(num_hidden_layers=arguments.layers, dtype="bfloat16")
        num_weights = write_checkpoint(checkpoint, config)
        for name in arguments.formats.split(","):
            pack = Path(scratch) / f"pack-{name}"
            time.sleep(1)
            done = subprocess.run(
                [sys.executable, "-c", CHILD, str(checkpoint), str(pack), name], capture_output=True, text=True
            )
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
            took_s, peak_bytes = json.loads(done.stdout.splitlines()[-1])
            print(
                f"| {name} | {num_weights / 1e6:.0f} M | {took_s:.1f} | {num_weights / took_s / 1e6:.0f} "
                f"| {peak_bytes / (1 << 20):.0f} |",
                flush=True,
            )
            for path in pack.iterdir():
                path.unlink()


if __name__ == "__main__":
    main()
