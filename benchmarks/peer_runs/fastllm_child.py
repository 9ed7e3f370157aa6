"""Decodes with fastllm in a process of its own; run by an interpreter that has ftllm and nothing of this project.
Takes one JSON object of settings, prints one of figures on the last line (fastllm prints others before)."""

import ctypes
import itertools
import json
import random
import sys
import time
from importlib.metadata import version
from typing import NamedTuple

from ftllm import llm
from ftllm.util import make_normal_llm_model, make_normal_parser
from process_io import disk_read_bytes


def _open(settings: dict) -> object:
    arguments = [settings["model"], "--device", "cpu", "--threads", str(settings["threads"]), "--max_batch", "1"]
    arguments += ["--tokens", "1024", "--prefix_cache", "false"]
    if settings["cache_bytes"] is None:
        arguments += ["--moe_device", "cpu"]
    else:
        arguments += ["--moe_device", "disk", "--moe_cpu_cache", str(settings["cache_bytes"])]
    return make_normal_llm_model(make_normal_parser("peers").parse_args(arguments))


class _Arrival(NamedTuple):
    token: int
    time_s: float
    read_bytes: int


def _generate(model: object, prompt: list[int], num_tokens: int) -> list[_Arrival]:
    """Nearly uniform sampling: random tokens, as the other engines are fed."""
    stop_len, stop_list = model.stop_token_ctypes(None)
    handle = llm.fastllm_lib.launch_response_llm_model(
        model.model,
        len(prompt),
        (ctypes.c_int * len(prompt))(*prompt),
        ctypes.c_int(num_tokens),
        ctypes.c_int(num_tokens),  # no fewer: an end token does not end it
        ctypes.c_bool(True),
        ctypes.c_float(1.0),
        ctypes.c_int(256),
        ctypes.c_float(100.0),
        ctypes.c_float(1.0),
        ctypes.c_bool(False),
        stop_len,
        stop_list,
    )
    arrivals = []
    while True:
        if not llm.fastllm_lib.can_fetch_response_llm_model(model.model, handle):
            time.sleep(0.0005)
            continue
        token = llm.fastllm_lib.fetch_response_llm_model(model.model, handle)
        if token < 0:
            return arrivals
        arrivals.append(_Arrival(token, time.perf_counter(), disk_read_bytes()))


def main() -> None:
    """A prompt, some tokens to warm up, then tokens that count; then a longer prompt."""
    settings = json.loads(sys.argv[1])
    draw = random.Random(settings["seed"])
    begin_s = time.perf_counter()
    model = _open(settings)
    load_s = time.perf_counter() - begin_s

    def prompt(count: int) -> list[int]:
        return [draw.randrange(256) for _ in range(count)]

    warmup, decode = settings["warmup_tokens"], settings["decode_tokens"]
    arrivals = _generate(model, prompt(settings["prompt_tokens"]), warmup + decode + 1)
    if len(arrivals) <= warmup + 1:
        sys.exit(f"fastllm gave {len(arrivals)} tokens of {warmup + decode + 1}")
    counted = arrivals[warmup:]
    figures = {
        "version": f"ftllm {version('ftllm')}",
        "load_s": load_s,
        "step_s": [later.time_s - earlier.time_s for earlier, later in itertools.pairwise(counted)],
        "read_bytes": (counted[-1].read_bytes - counted[0].read_bytes) / (len(counted) - 1),
        "prefill_s": None,
        "num_distinct_tokens": len({arrival.token for arrival in arrivals}),
        "cache": llm.get_disk_moe_cache_stats(),
    }
    if settings["prefill_tokens"]:
        before_bytes, begin_s = disk_read_bytes(), time.perf_counter()
        first = _generate(model, prompt(settings["prefill_tokens"]), 1)[0]
        figures["prefill_s"] = first.time_s - begin_s
        figures["prefill_read_bytes"] = first.read_bytes - before_bytes
    print("\n" + json.dumps(figures), flush=True)
    model.release_memory()


if __name__ == "__main__":
    main()
