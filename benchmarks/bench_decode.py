"""Loading and decoding at several shares of the experts resident, each in a process of its own.

The bound of a row is 1 / max(bytes missed / disk rate, bytes read from memory / memory rate) for one token, with the
rates measured in the same run. Without --pack: the demo model, and a synthetic pack in the shape of Mixtral-8x7B with 4
of its 32 layers (random weights route almost uniformly, which is the hardest case for a cache).
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

MIB = 1 << 20
SHARES = (0.25, 0.5, 1.0)

CHILD = """
import json, sys, time
import moe_offload  # before torch, as the command line has it
import torch, transformers
transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
from moe_offload.offload.planning.memory import peak_rss_bytes, reset_peak_rss, rss_bytes
base_bytes = rss_bytes(); reset_peak_rss()
from moe_offload import OffloadedModel
pack, ram_bytes, tokens, prefetch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
prefetch = int(prefetch) if prefetch.isdecimal() else prefetch
begin_s = time.perf_counter()
settings = dict(device="cpu", ram=ram_bytes, context_tokens=1024, prefetch=prefetch, warm_start=False)
with OffloadedModel.from_pretrained(pack, **settings) as m:
    load_s = time.perf_counter() - begin_s
    load_peak_bytes = peak_rss_bytes() - base_bytes
    vocab = m.model.config.vocab_size
    prompt = torch.randint(3, vocab, (1, 32), generator=torch.Generator().manual_seed(0))
    if m.tokenizer is not None:
        prompt = m.tokenizer("The history of the city begins with", return_tensors="pt")["input_ids"]
    def run(count):
        return m.model.generate(input_ids=prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    with torch.inference_mode():
        run(min(tokens, 16))  # fills the cache
        earlier = m._meter.read()
        begin_s = time.perf_counter(); run(1); first_s = time.perf_counter() - begin_s
        begin_s = time.perf_counter(); before = m._meter.read(); run(tokens + 1)
        decode_s = time.perf_counter() - begin_s - first_s
        report = m._meter.since(before)
    expert_bytes = sum(l.slot_bytes for l in m.manifest.layers) / len(m.manifest.layers)
    print(json.dumps(dict(
        load_s=load_s, load_peak_bytes=load_peak_bytes, peak_bytes=peak_rss_bytes() - base_bytes,
        share=m.plan.resident_share, first_s=first_s, tokens_per_s=tokens / decode_s, hit_ratio=report.hit_ratio,
        bytes_read=report.bytes_read / (tokens + 1), stall_s=report.stall_s, decode_s=decode_s,
        used_bytes=(report.hits + report.misses) / (tokens + 1) * expert_bytes,
        dense_bytes=m.plan.dense_bytes, recall=report.prefetch_recall,
    )))
"""

PLAN = """
import json, sys
from transformers import AutoConfig
from moe_offload.offload.pack.manifest import read_manifest
from moe_offload.offload.dense_weights import DenseWeights
from moe_offload.offload.planning.plan import make_plan
from moe_offload.offload.planning.workspace import experts_per_token
from moe_offload.offload.row_embedding import table_in_pack
from pathlib import Path
manifest, config = read_manifest(sys.argv[1]), AutoConfig.from_pretrained(sys.argv[1])
top_k, dense = experts_per_token(config), DenseWeights(Path(sys.argv[1]), manifest)
table = table_in_pack(config, dense.keys(), "cpu")
plan = make_plan(manifest, config, device="cpu", ram_bytes=1 << 50, vram_bytes=None, context_tokens=1024,
                 dtype_bytes=config.dtype.itemsize, top_k_per_layer=[top_k] * len(manifest.layers),
                 resident_dense_bytes=dense.resident_bytes(config.dtype, without=table))
slots = sum(l.num_experts * l.slot_bytes for l in manifest.layers)
print(json.dumps([plan.total_bytes("RAM") - slots, [[l.num_experts, l.slot_bytes] for l in manifest.layers]]))
"""


def child(code: str, *arguments: object) -> dict | list:
    """The JSON that a fresh interpreter prints last."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def drop_page_cache(folder: Path) -> None:
    """Make the disk read again what the system has cached of the pack."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bench(pack: Path, name: str, tokens: int, prefetch: str, memory_rate: float) -> list[dict]:
    """One row a share."""
    from moe_offload.offload.planning.rates import disk_read_rate

    # Of the pack's own files, with as many threads as the reader has, before and after every row; the best, since the
    # machine is shared and what is below its disk caches too.
    files = sorted(pack.glob("experts-*.safetensors"))[:4]

    def disk_rate() -> float:
        return max(disk_read_rate(file).bytes_per_s for file in files)

    fixed_bytes, layers = child(PLAN, pack)
    best_disk_rate = disk_rate()
    rows = []
    for share in SHARES:
        slots_bytes = sum(math.ceil(share * experts) * slot_bytes for experts, slot_bytes in layers)
        ram_bytes = fixed_bytes + slots_bytes
        drop_page_cache(pack)
        row = child(CHILD, pack, ram_bytes, tokens, prefetch)
        rows.append(row | {"model": name, "ram_bytes": ram_bytes})
        best_disk_rate = max(best_disk_rate, disk_rate())
    print(f"| *{name}: disk read {best_disk_rate / 1e9:.2f} GB/s* | | | | | | | | | | | |")
    for row in rows:
        used_bytes = row["used_bytes"] + row["dense_bytes"]
        row["bound"] = 1 / max(row["bytes_read"] / best_disk_rate, used_bytes / memory_rate)
        print(
            f"| {name} | {row['share']:.0%} | {row['ram_bytes'] / MIB:.0f} | {row['peak_bytes'] / MIB:.0f} "
            f"| {row['load_s']:.1f} | {row['load_peak_bytes'] / MIB:.0f} | {row['tokens_per_s']:.2f} "
            f"| {row['hit_ratio']:.0%} | {row['bytes_read'] / MIB:.0f} | {row['stall_s'] / row['decode_s']:.0%} "
            f"| {row['bound']:.2f} | {row['tokens_per_s'] / row['bound']:.0%} |",
            flush=True,
        )
    return rows


def main() -> None:
    """Print a Markdown table; --json writes the figures too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, help="a pack to measure instead of the two standard ones")
    parser.add_argument("--tokens", type=int, default=48, help="decode steps to time")
    parser.add_argument("--prefetch", default="auto", help="off, auto or a number of layers")
    parser.add_argument("--layers", type=int, default=4, help="layers of the synthetic Mixtral")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()

    import torch
    from transformers import MixtralConfig

    from moe_offload.offload.demo.build import ensure_demo
    from moe_offload.offload.pack.synthetic import write_synthetic_pack
    from moe_offload.offload.planning.rates import memory_read_rate
    from moe_offload.quant import backend_name

    memory_rate = max(memory_read_rate().bytes_per_s for _ in range(3))
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, kernels "
        f"{backend_name()}; memory read {memory_rate / 1e9:.1f} GB/s\n"
    )
    print(
        "| model | experts resident | RAM given, MiB | peak, MiB | load, s | load peak, MiB | tok/s | hits "
        "| read a token, MiB | stall | bound, tok/s | of bound |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
    )
    rows = []
    measure = {"tokens": arguments.tokens, "prefetch": arguments.prefetch}
    if arguments.pack:
        rows += bench(arguments.pack, arguments.pack.name, **measure, memory_rate=memory_rate)
    else:
        rows += bench(ensure_demo(), "demo", **measure, memory_rate=memory_rate)
        with tempfile.TemporaryDirectory() as scratch:
            pack = Path(scratch) / "mixtral"
            config = MixtralConfig(num_hidden_layers=arguments.layers, dtype="bfloat16")
            write_synthetic_pack(pack, config, format="nf4")
            name = f"Mixtral-8x7B shape, {arguments.layers} layers, nf4"
            rows += bench(pack, name, **measure, memory_rate=memory_rate)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
