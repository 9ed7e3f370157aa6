"""Builds the demo: a dense model made into a mixture of experts by sparse upcycling (Komatsuzaki et al. 2022,
arXiv 2212.05055). Every expert is the dense MLP with a little noise of its own; the rest is copied.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, MixtralConfig, PreTrainedTokenizerFast

from moe_offload.errors import DiskFullError
from moe_offload.offload.demo.corpus import CONVERSATIONS
from moe_offload.offload.demo.router import fit_router
from moe_offload.offload.demo.source import DemoSource
from moe_offload.offload.progress import NULL_PROGRESS, ProgressSink

NUM_EXPERTS = 8
TOP_K = 2
NOISE = 0.01  # standard deviation, relative to the weight's own
TURNS = 10  # conversations in one forward pass
DTYPE = torch.bfloat16

_MIXTRAL_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_TIED_NAME = "lm_head.weight"  # to the embeddings: not written


def build_demo_checkpoint(
    folder: Path, *, num_layers: int | None = None, seed: int = 0, progress: ProgressSink = NULL_PROGRESS
) -> None:
    """Writes the checkpoint into ``folder``, a layer at a time: the dense model in fp32 is all it holds in memory.

    ``num_layers`` keeps the first layers only: quick, and no longer a model that answers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = DemoSource(num_layers=num_layers)
    tokenizer = source.tokenizer()
    dense = source.dense_model()
    progress.start("Fitting the demo's routers", None)
    try:
        gates = _fit_gates(dense, tokenizer, seed)
    finally:
        progress.finish()
    tokenizer.save_pretrained(folder)
    _mixtral_config(source.config).save_pretrained(folder)
    ids = {"bos_token_id": source.config.bos_token_id, "eos_token_id": source.config.eos_token_id}
    GenerationConfig(**ids, pad_token_id=source.config.pad_token_id).save_pretrained(folder)
    shards = _shards(dense, gates, seed)
    _write_shards(folder, shards, len(gates) + 1, _checkpoint_bytes(dense, gates), progress)


def _fit_gates(dense: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> list[Tensor]:
    return [
        fit_router(states, num_experts=NUM_EXPERTS, top_k=TOP_K, seed=seed + layer_idx)
        for layer_idx, states in enumerate(mlp_inputs(dense, tokenizer))
    ]


def mlp_inputs(dense: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> list[Tensor]:
    """What each layer's MLP sees ``[T, H]`` over the corpus, in the chat format.

    Every dialogue begins with the same system prompt, which counts once, and never its first token: models park
    attention there, and its state would make a cluster of its own.
    """
    texts = []
    for start in range(0, len(CONVERSATIONS), TURNS):
        turns = CONVERSATIONS[start : start + TURNS]
        messages = [
            message
            for question, answer in turns
            for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        ]
        texts.append(tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"])
    num_common = next(idx for idx, column in enumerate(zip(*texts, strict=False)) if len(set(column)) > 1)
    seen: list[list[Tensor]] = [[] for _ in dense.model.layers]
    hooks = [
        layer.post_attention_layernorm.register_forward_hook(
            lambda module, args, output, layer_idx=layer_idx: seen[layer_idx].append(output[0])
        )
        for layer_idx, layer in enumerate(dense.model.layers)
    ]
    try:
        with torch.inference_mode():
            for ids in texts:
                dense.model(torch.tensor([ids]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat([states[0][1:], *(more[num_common:] for more in states[1:])]).clone() for states in seen]


def _mixtral_config(dense: LlamaConfig) -> MixtralConfig:
    return MixtralConfig(
        vocab_size=dense.vocab_size,
        hidden_size=dense.hidden_size,
        intermediate_size=dense.intermediate_size,
        num_hidden_layers=dense.num_hidden_layers,
        num_attention_heads=dense.num_attention_heads,
        num_key_value_heads=dense.num_key_value_heads,
        head_dim=dense.head_dim,
        max_position_embeddings=dense.max_position_embeddings,
        rms_norm_eps=dense.rms_norm_eps,
        rope_parameters=dense.rope_parameters,
        tie_word_embeddings=True,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        sliding_window=None,
        bos_token_id=dense.bos_token_id,
        eos_token_id=dense.eos_token_id,
        pad_token_id=dense.pad_token_id,
        dtype=DTYPE,
        architectures=["MixtralForCausalLM"],
    )


def _shards(dense: LlamaForCausalLM, gates: list[Tensor], seed: int) -> Iterator[dict[str, Tensor]]:
    """The checkpoint's tensors under Mixtral's names: one dictionary per layer, then what belongs to no layer."""
    weights = dense.state_dict()
    for layer_idx, gate in enumerate(gates):
        generator = torch.Generator().manual_seed(seed + layer_idx)
        prefix = f"model.layers.{layer_idx}."
        shard = {f"{prefix}block_sparse_moe.gate.weight": gate.to(DTYPE)}
        for name in [name for name in weights if name.startswith(prefix)]:
            weight = weights.pop(name)
            kind = name.split(".")[-2]
            if kind not in _MIXTRAL_NAMES:
                shard[name] = weight.to(DTYPE)
                continue
            for expert_idx in range(NUM_EXPERTS):
                noise = torch.randn(weight.shape, generator=generator).mul_(NOISE * weight.std())
                mixtral_name = f"{prefix}block_sparse_moe.experts.{expert_idx}.{_MIXTRAL_NAMES[kind]}.weight"
                shard[mixtral_name] = noise.add_(weight).to(DTYPE)
        yield shard
    weights.pop(_TIED_NAME)
    yield {name: weight.to(DTYPE) for name, weight in weights.items()}


def _checkpoint_bytes(dense: LlamaForCausalLM, gates: list[Tensor]) -> int:
    """Of all tensors of `_shards` together."""
    num_weights = sum(gate.numel() for gate in gates)
    for name, weight in dense.state_dict().items():
        if name != _TIED_NAME:
            num_weights += weight.numel() * (NUM_EXPERTS if name.split(".")[-2] in _MIXTRAL_NAMES else 1)
    return num_weights * DTYPE.itemsize


def _write_shards(
    folder: Path, shards: Iterator[dict[str, Tensor]], num_shards: int, total_bytes: int, progress: ProgressSink
) -> None:
    weight_map: dict[str, str] = {}
    progress.start("Writing the demo's checkpoint", total_bytes)
    try:
        for idx, shard in enumerate(shards, start=1):
            file = f"model-{idx:05d}-of-{num_shards:05d}.safetensors"
            try:
                save_file(shard, folder / file, metadata={"format": "pt"})
            except SafetensorError as error:  # what safetensors makes of every OSError
                raise DiskFullError(
                    f"cannot write {folder / file}: {error}; "
                    "make room or set MOE_OFFLOAD_HOME to a folder on another disk"
                ) from error
            weight_map |= dict.fromkeys(shard, file)
            progress.advance(sum(tensor.nbytes for tensor in shard.values()))
    finally:
        progress.finish()
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
