"""Decodes with transformers and accelerate's CPU offload: bf16 weights, as many layers on the device as the cap holds.

Where RAM cannot hold the model, fewer layers run under the same share of the cap, and a token's time is scaled by their
number: every layer costs the same. The embedding and the head are then counted too often, which favours neither much.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import dispatch_model, infer_auto_device_map
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from moe_offload.offload.planning.memory import ram_memory

_RAM_SHARE = 0.7


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second of the whole model, and how many layers were run to tell."""
    config = AutoConfig.from_pretrained(Path(job["pack"]))
    all_layers = config.num_hidden_layers
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    size_bytes = sum(param.numel() * param.element_size() for param in whole.parameters())
    room_bytes = _RAM_SHARE * ram_memory().free_bytes + (job["cap_bytes"] if job["device"] != "cpu" else 0)
    num_layers = max(1, min(all_layers, int(all_layers * room_bytes / size_bytes)))
    config.num_hidden_layers = num_layers
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for param in model.parameters():
        param.data.fill_(0.01)  # the pages have to be there; what is in them decides nothing
    if job["device"] != "cpu":
        cap_bytes = job["cap_bytes"] * num_layers // all_layers
        blocks = model._no_split_modules
        places = infer_auto_device_map(model, {0: cap_bytes, "cpu": "1000GiB"}, no_split_module_classes=blocks)
        model = dispatch_model(model, places, main_device=0)
    tokens = torch.randint(3, config.vocab_size, (1, 32), device=job["device"])
    with torch.inference_mode():
        cache = model(tokens, use_cache=True).past_key_values
        times = []
        for _ in range(job["accelerate_tokens"] + 1):
            begin_s = time.perf_counter()
            cache = model(tokens[:, :1], past_key_values=cache, use_cache=True).past_key_values
            if job["device"] != "cpu":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin_s)
    step_s = sum(times[1:]) / len(times[1:]) * all_layers / num_layers
    return {"tokens_per_s": 1 / step_s, "layers_measured": num_layers, "layers": all_layers}


def main() -> None:
    """The job from the standard input, figures to the output."""
    transformers.logging.set_verbosity_error()
    print(json.dumps(measure(json.load(sys.stdin))))


if __name__ == "__main__":
    main()
