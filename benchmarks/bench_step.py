"""What a decode step spends outside the experts, a layer and a token: eager modules against fused ones.

Each model has the real shape of its dense part, or a narrow one in which only the overhead is left, and experts that
return zeros. A layer's time is the slope over the number of layers; what is left is the token's: generate's loop, the
embedding, the last norm and a head of few words. The time of the main thread alone, on one thread, is what Python and
its calls cost; other work on the machine disturbs it least. `--profile` adds where a fused step's time goes.

    python benchmarks/bench_step.py
"""

import argparse
import cProfile
import json
import os
import pstats
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

LAYERS = (1, 5)
# Heads and widths of the models; experts as small as a format allows, and few words.
_SMALL = {"vocab_size": 2048, "num_hidden_layers": LAYERS[1], "dtype": "bfloat16"}
CONFIGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # name: model type, its dense part, the same but narrow
    "Mixtral-8x7B": (
        "mixtral",
        {"intermediate_size": 64},
        {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    ),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        {
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "moe_intermediate_size": 64,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
        },
        {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    ),
    "OLMoE-1B-7B": (
        "olmoe",
        {"intermediate_size": 64, "num_experts": 64, "num_experts_per_tok": 8},
        {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4},
    ),
    "gpt-oss-20b": (
        "gpt_oss",
        {"intermediate_size": 64, "num_local_experts": 32, "num_experts_per_tok": 4, "layer_types": None},
        {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    "DeepSeek-V2-Lite": (
        "deepseek_v2",
        {
            "hidden_size": 2048,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "moe_intermediate_size": 64,
            "n_routed_experts": 64,
            "num_experts_per_tok": 6,
            "n_shared_experts": 2,
            "first_k_dense_replace": 0,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
        },
        {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4},
    ),
    "Qwen3-Next-80B-A3B": (
        "qwen3_next",
        {
            "num_experts": 512,
            "num_experts_per_tok": 10,
            "moe_intermediate_size": 64,
            # of the layers added, one of four attends, as in the model
            "layer_types": ["full_attention", *["linear_attention"] * 3, "full_attention"],
        },
        {
            "hidden_size": 256,
            "num_attention_heads": 4,
            "head_dim": 64,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "shared_expert_intermediate_size": 64,
        },
    ),
    "GLM-4.7-Flash": (
        "glm4_moe_lite",
        {
            "hidden_size": 2048,
            "num_attention_heads": 20,
            "num_key_value_heads": 20,
            "moe_intermediate_size": 64,
            "n_routed_experts": 64,
            "num_experts_per_tok": 4,
            "n_shared_experts": 1,
            "mlp_layer_types": ["sparse"] * LAYERS[1],
        },
        {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 128},
    ),
}


def write_pack(folder: Path, name: str, width: str) -> None:
    """A synthetic pack of one model."""
    from transformers import AutoConfig

    from moe_offload.offload.pack.synthetic import write_synthetic_pack

    model_type, dense, narrow = CONFIGS[name]
    config = AutoConfig.for_model(model_type, **(_SMALL | dense | (narrow if width == "narrow" else {})))
    write_synthetic_pack(folder, config, format="nf4")


def measure(pack: Path, tokens: int, prompt_tokens: int, with_profile: bool) -> dict[str, Any]:
    """Seconds of a layer and of the rest of a token, with the modules that the environment asks for."""
    import time

    import torch

    from moe_offload import OffloadedModel

    with OffloadedModel.from_pretrained(pack, device="cpu", ram="6GiB", context_tokens=prompt_tokens + 1024) as loaded:
        model = loaded.model
        for layer in loaded.manifest.layers:
            experts = model.get_submodule(layer.module)
            experts.forward = lambda hidden_states, *_: torch.zeros_like(hidden_states)
        inputs = torch.randint(0, 2000, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
        layers = list(model.model.layers)

        def run(count: int, clock: Callable[[], float]) -> float:
            begin_s = clock()
            model.generate(input_ids=inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)
            return clock() - begin_s

        def token_s(clock: Callable[[], float]) -> list[float]:
            """The least time of a token with few layers and with many."""
            times: dict[int, list[float]] = {count: [] for count in LAYERS}
            for _ in range(5):
                for count in LAYERS:
                    model.model.layers = torch.nn.ModuleList(layers[:count])
                    run(2, clock)
                    times[count].append((run(tokens + 1, clock) - run(1, clock)) / tokens)
            return [min(times[count]) for count in LAYERS]

        with torch.inference_mode():
            few, many = token_s(time.perf_counter)
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            few_alone, many_alone = token_s(time.thread_time)
            torch.set_num_threads(threads)
            if with_profile:
                profile = cProfile.Profile()
                profile.runcall(run, tokens, time.perf_counter)
                pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(25)
    added = LAYERS[1] - LAYERS[0]
    layer_s, alone_s = (many - few) / added, (many_alone - few_alone) / added
    held = [tensor for layer in layers[LAYERS[0] :] for tensor in (*layer.parameters(), *layer.buffers())]
    dense_bytes = sum(tensor.nbytes for tensor in held) / added
    return {
        "layer_s": layer_s,
        "rest_s": few - LAYERS[0] * layer_s,
        "alone_s": alone_s,
        "rest_alone_s": few_alone - LAYERS[0] * alone_s,
        "layer_bytes": dense_bytes,
    }


def child(pack: Path, mode: str, tokens: int, prompt_tokens: int, with_profile: bool) -> dict[str, Any]:
    """`measure` in a process of its own."""
    arguments = [sys.executable, __file__, "--child", str(pack), "--tokens", str(tokens)]
    arguments += ["--prompt-tokens", str(prompt_tokens)]
    environment = os.environ | {"MOE_OFFLOAD_DENSE": mode}
    done = subprocess.run(
        arguments + (["--profile"] if with_profile else []), env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    if with_profile:
        print(done.stderr[done.stderr.find("function calls") - 20 :])
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, action="append", help="one of the models; all by default")
    parser.add_argument("--width", choices=("real", "narrow"), action="append", help="both by default")
    parser.add_argument("--tokens", type=int, default=48, help="decode steps to time")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="tokens in the cache before those")
    parser.add_argument("--profile", action="store_true", help="print where a fused step's time goes")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments.tokens, arguments.prompt_tokens, arguments.profile)))
        return

    from moe_offload.offload.planning.rates import memory_read_rate

    memory_rate = max(memory_read_rate().bytes_per_s for _ in range(3))
    print(f"memory read {memory_rate / 1e9:.1f} GB/s; times in ms\n")
    print(
        "| model | width | modules | a layer | of it memory's | overhead | a token besides "
        "| main thread, a layer | a token besides |\n|---|---|---|---|---|---|---|---|---|"
    )
    for name in arguments.model or CONFIGS:
        for width in arguments.width or ("real", "narrow"):
            with tempfile.TemporaryDirectory() as scratch:
                pack = Path(scratch) / "pack"
                write_pack(pack, name, width)
                for mode in ("eager", "fused"):
                    figures = child(
                        pack, mode, arguments.tokens, arguments.prompt_tokens, arguments.profile and mode == "fused"
                    )
                    memory_s = figures["layer_bytes"] / memory_rate
                    print(
                        f"| {name} | {width} | {mode} | {1e3 * figures['layer_s']:.3f} | {1e3 * memory_s:.3f} "
                        f"| {1e3 * (figures['layer_s'] - memory_s):.3f} | {1e3 * figures['rest_s']:.3f} "
                        f"| {1e3 * figures['alone_s']:.3f} | {1e3 * figures['rest_alone_s']:.3f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
