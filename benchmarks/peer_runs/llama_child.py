"""Decodes with llama.cpp in a process of its own; run by an interpreter that has llama-cpp-python and nothing of this
project. Takes one JSON object of settings, prints one of figures."""

import ctypes
import json
import random
import sys
import time

import llama_cpp
from process_io import disk_read_bytes

LENGTH = 4096


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _errors_only(level: int, text: bytes, _: object) -> None:
    if level >= 4:
        sys.stderr.write(text.decode(errors="replace"))


def _open(settings: dict) -> tuple[object, object]:
    model_params = llama_cpp.llama_model_default_params()
    model_params.n_gpu_layers = 0
    # Repacked weights are a copy in memory: only where all of them fit.
    model_params.use_extra_bufts = settings["repack"]
    model_params.use_mmap = not settings["repack"]
    model = llama_cpp.llama_model_load_from_file(settings["model"].encode(), model_params)
    if not model:
        sys.exit(f"llama.cpp cannot load {settings['model']}")
    context_params = llama_cpp.llama_context_default_params()
    context_params.n_ctx = LENGTH
    context_params.n_batch = context_params.n_ubatch = max(512, settings["prefill_tokens"])
    context_params.n_threads = context_params.n_threads_batch = settings["threads"]
    if "flash_attention" in settings:
        context_params.flash_attn_type = int(settings["flash_attention"])
    context = llama_cpp.llama_init_from_model(model, context_params)
    if not context:
        sys.exit("llama.cpp makes no context")
    return model, context


def _step(context: object, tokens: list[int]) -> float:
    """Seconds that it takes to get the logits of these tokens."""
    ids = (llama_cpp.llama_token * len(tokens))(*tokens)  # a batch only points at them
    begin_s = time.perf_counter()
    batch = llama_cpp.llama_batch_get_one(ids, len(tokens))
    if llama_cpp.llama_decode(context, batch):
        sys.exit("llama_decode failed")
    llama_cpp.llama_get_logits(context)
    return time.perf_counter() - begin_s


def main() -> None:
    """Prefill, some tokens to warm up, then tokens that count."""
    settings = json.loads(sys.argv[1])
    llama_cpp.llama_log_set(_errors_only, None)
    llama_cpp.llama_backend_init()
    begin_s = time.perf_counter()
    _, context = _open(settings)
    load_s = time.perf_counter() - begin_s
    draw = random.Random(settings["seed"])
    vocab_size = settings["vocab_size"]

    def tokens(count: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(count)]

    _step(context, tokens(settings["prompt_tokens"]))
    for _ in range(settings["warmup_tokens"]):
        _step(context, tokens(1))
    before_bytes = disk_read_bytes()
    step_s = [_step(context, tokens(1)) for _ in range(settings["decode_tokens"])]
    figures = {
        "version": f"llama-cpp-python {llama_cpp.__version__}",
        "features": llama_cpp.llama_print_system_info().decode().strip(" |"),
        "load_s": load_s,
        "step_s": step_s,
        "read_bytes": (disk_read_bytes() - before_bytes) / len(step_s),
        "prefill_s": None,
    }
    if settings["prefill_tokens"]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        before_bytes = disk_read_bytes()
        figures["prefill_s"] = _step(context, tokens(settings["prefill_tokens"]))
        figures["prefill_read_bytes"] = disk_read_bytes() - before_bytes
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
