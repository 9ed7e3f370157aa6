"""What sharing out the experts costs and gains on one machine: one process beside two ranks, in turns.

    python benchmarks/scaling.py                       # the shape of Mixtral-8x7B, 8 layers, 2 GiB a rank
    python benchmarks/scaling.py --like qwen3-30b-a3b --layers 12 --ram 1GiB

Both have the same threads in all. A line of the table is the best of its runs; ``exchanged`` is what rank 0 sent and
received for a token, and beside it what docs/scaling.md's arithmetic says. Before it, what a message costs: a decode
step's request and its answer, there and back, over gloo on this machine.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_ROUND_TRIPS = 300


def main() -> None:
    """Print the round trip and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", default="mixtral-8x7b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--format", default="nf4")
    parser.add_argument("--ram", default="2GiB", help="of each process")
    parser.add_argument("--one-ram", help="of the one process, if it is to have another budget, such as all ranks' sum")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of all processes together")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every run to a file")
    parser.add_argument("--round-trip", nargs=2, type=int, metavar=("WIDTH", "ROWS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.round_trip is not None:
        _round_trip(*options.round_trip)
        return
    pack = _pack(options)
    width, top_k, num_layers = _shape(pack)
    rows = max(1, top_k * (options.ranks - 1) // options.ranks)
    script = [__file__, "--round-trip", str(width), str(rows)]
    print(f"a step's request and {rows} rows of {width} back: {_torchrun(2, script, threads=1).strip()}\n")
    runs: dict[str, list[dict[str, Any]]] = {"1": [], str(options.ranks): []}
    for _ in range(options.repeat):
        runs["1"].append(_bench(pack, options, 1))
        runs[str(options.ranks)].append(_bench(pack, options, options.ranks))
    print(_table(runs, width, top_k, num_layers, options))
    if options.json is not None:
        options.json.write_text(json.dumps({"options": vars(options) | {"json": None}, "runs": runs}, indent=1))


def _pack(options: argparse.Namespace) -> Path:
    from moe_offload.offload.bench import Shape, synthetic_pack

    return synthetic_pack(Shape(options.like, layers=options.layers, format=options.format, dense_format="nf4"))


def _shape(pack: Path) -> tuple[int, int, int]:
    """Hidden size, experts a token, layers with experts."""
    from moe_offload.offload.first_use import pack_config
    from moe_offload.offload.pack.manifest import read_manifest
    from moe_offload.offload.planning.workspace import experts_per_token

    config = pack_config(pack).get_text_config(decoder=True)
    return config.hidden_size, experts_per_token(config), len(read_manifest(pack).layers)


def _bench(pack: Path, options: argparse.Namespace, num_ranks: int) -> dict[str, Any]:
    ram = options.one_ram if num_ranks == 1 and options.one_ram else options.ram
    threads = max(1, options.threads // num_ranks)
    command = ["-m", "moe_offload", "bench", str(pack), "--ram", ram, "--prefetch", "off", "--json", "-"]
    command += ["--new-tokens", str(options.new_tokens), "--warmup-tokens", "12", "--threads", str(threads)]
    if num_ranks == 1:
        text = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True, check=True).stdout
    else:
        text = _torchrun(num_ranks, command, threads=threads)
    run: dict[str, Any] = json.loads(text)["rows"][0]["best"]
    return run


def _torchrun(num_ranks: int, command: list[str], *, threads: int) -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}", f"--master-port={port}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    return subprocess.run([*launcher, *command], env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def _round_trip(width: int, num_rows: int) -> None:
    """On either of two ranks."""
    import torch

    from moe_offload.offload.experts.peers import Call
    from moe_offload.offload.parallel.group import ExpertGroup
    from moe_offload.offload.parallel.messages import Request, receive, receive_reply, send_reply, send_request

    cpu = torch.device("cpu")
    request = Request(
        0,
        Call.STEP,
        False,
        {expert_idx: torch.zeros(1, dtype=torch.long) for expert_idx in range(num_rows)},
        torch.zeros(1, width, dtype=torch.bfloat16),
    )
    answer, times_s = torch.zeros(num_rows, width), []
    with ExpertGroup.from_environment("cpu") as group:
        (link,) = group.links.values()
        for _ in range(_ROUND_TRIPS):
            if group.rank:
                receive(link, cpu)
                send_reply(link, answer)
                continue
            begin_s = time.perf_counter()
            works = send_request(link, request)
            receive_reply(link, cpu)
            times_s.append(time.perf_counter() - begin_s)
            for work in works:
                work.wait()
    if times_s:
        low, middle = min(times_s), statistics.median(times_s)
        print(f"{middle * 1e6:.0f} us in the median of {len(times_s)}, {low * 1e6:.0f} us at best")


def _table(
    runs: dict[str, list[dict[str, Any]]], width: int, top_k: int, num_layers: int, options: argparse.Namespace
) -> str:
    lines = [
        "| processes | RAM of each | tok/s | median | hits | read a token | waited a token | exchanged a token | "
        "by the arithmetic |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, figures in runs.items():
        best = max(figures, key=lambda run: float(run["tokens_per_s"]))
        num_ranks = int(name)
        elsewhere = top_k * (num_ranks - 1) / num_ranks
        said = num_layers * _asked(num_ranks, top_k) * (2 * 512 + width * 2) + num_layers * elsewhere * width * 4
        cells = [
            name,
            options.one_ram if num_ranks == 1 and options.one_ram else options.ram,
            f"{best['tokens_per_s']:.2f}",
            f"{statistics.median(run['tokens_per_s'] for run in figures):.2f}",
            f"{best['hit_ratio']:.0%}",
            f"{best['bytes_read_per_token'] / 2**20:.0f} MiB",
            f"{best['peer_wait_s'] / best['tokens'] * 1e3:.1f} ms" if num_ranks > 1 else "",
            f"{best['peer_bytes'] / best['tokens'] / 1024:.0f} KiB" if num_ranks > 1 else "",
            f"{said / 1024:.0f} KiB" if num_ranks > 1 else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _asked(num_ranks: int, top_k: int) -> float:
    """Ranks that a token's experts of a layer are at besides rank 0, on average."""
    return (num_ranks - 1) * (1 - (1 - 1 / num_ranks) ** top_k)


if __name__ == "__main__":
    main()
