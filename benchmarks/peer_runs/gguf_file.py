"""GGUF files of random weights, for llama.cpp and fastllm. Needs the packages `gguf` and `numpy`.

Blocks are filled with random codes and one scale, so that a matrix keeps the size of what it multiplies; formats as in
ggml-common.h of llama.cpp.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from peer_runs.shapes import Shape

Codes = np.ndarray


def _scale_bytes(value: float) -> np.ndarray:
    return np.frombuffer(np.float16(value).tobytes(), np.uint8)


def _q4_0(blocks: int, std: float, rng: np.random.Generator) -> Codes:
    """A scale, 32 codes of 4 bits less 8; the codes 1 to 15 have a standard deviation of 4.32."""
    codes = rng.integers(1, 16, (2, blocks, 16), np.uint8)
    return np.concatenate([np.tile(_scale_bytes(std / 4.32), (blocks, 1)), codes[0] | codes[1] << 4], axis=1)


def _q8_0(blocks: int, std: float, rng: np.random.Generator) -> Codes:
    """A scale, 32 codes of 8 bits; uniform codes from -127 to 127 have a standard deviation of 73.3."""
    codes = rng.integers(-127, 128, (blocks, 32), np.int8).view(np.uint8)
    return np.concatenate([np.tile(_scale_bytes(std / 73.3), (blocks, 1)), codes], axis=1)


def _q3_k(blocks: int, std: float, rng: np.random.Generator) -> Codes:
    """256 codes of 3 bits less 4 (deviation 2.3) in 16 groups with scales of 6 bits less 32 (18.5), and a scale."""
    codes = rng.integers(0, 256, (blocks, 32 + 64 + 12), np.uint8)
    return np.concatenate([codes, np.tile(_scale_bytes(std / (2.3 * 18.5)), (blocks, 1))], axis=1)


_BLOCKS: dict[str, tuple[int, Callable[[int, float, np.random.Generator], Codes]]] = {
    "Q4_0": (32, _q4_0),
    "Q8_0": (32, _q8_0),
    "Q3_K": (256, _q3_k),
}
FORMATS = tuple(_BLOCKS)
_FRESH_ROWS = 512  # what follows repeats them, moved along, which no kernel and no disk can tell


@dataclass(frozen=True)
class _Matrices:
    """One tensor of the file; ``rows`` x ``columns``, or as many of those as there are experts."""

    name: str
    experts: int | None
    rows: int
    columns: int
    std: float

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, self.columns) if self.experts is None else (self.experts, self.rows, self.columns)


def _packed(tensor: _Matrices, block_format: str, rng: np.random.Generator) -> np.ndarray:
    """The bytes of a tensor, its last axis in bytes."""
    block_weights, fill = _BLOCKS[block_format]
    all_rows = tensor.rows * (tensor.experts or 1)
    fresh_rows = min(all_rows, _FRESH_ROWS)
    row_blocks = tensor.columns // block_weights
    fresh = fill(fresh_rows * row_blocks, tensor.std, rng)
    block_bytes = fresh.shape[1]
    packed = np.empty((all_rows, row_blocks * block_bytes), np.uint8)
    for begin in range(0, all_rows, fresh_rows):
        moved = np.roll(fresh, begin // fresh_rows * 7, axis=0).reshape(fresh_rows, -1)
        packed[begin : begin + fresh_rows] = moved[: all_rows - begin]
    return packed.reshape(*tensor.shape[:-1], row_blocks * block_bytes)


def _layer_matrices(shape: Shape, layer_idx: int) -> Iterator[_Matrices]:
    hidden, expert = shape.hidden_size, shape.expert_size
    heads, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    into, out = hidden**-0.5, expert**-0.5
    prefix = f"blk.{layer_idx}."
    yield _Matrices(prefix + "attn_q.weight", None, heads, hidden, into)
    yield _Matrices(prefix + "attn_k.weight", None, kv, hidden, into)
    yield _Matrices(prefix + "attn_v.weight", None, kv, hidden, into)
    yield _Matrices(prefix + "attn_output.weight", None, hidden, heads, heads**-0.5)
    yield _Matrices(prefix + "ffn_gate_exps.weight", shape.num_experts, expert, hidden, into)
    yield _Matrices(prefix + "ffn_up_exps.weight", shape.num_experts, expert, hidden, into)
    yield _Matrices(prefix + "ffn_down_exps.weight", shape.num_experts, hidden, expert, out)


def _matrices(shape: Shape) -> Iterator[_Matrices]:
    yield _Matrices("token_embd.weight", None, shape.vocab_size, shape.hidden_size, 1.0)
    yield _Matrices("output.weight", None, shape.vocab_size, shape.hidden_size, shape.hidden_size**-0.5)
    for layer_idx in range(shape.num_layers):
        yield from _layer_matrices(shape, layer_idx)


def _plain_tensors(shape: Shape, rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    yield "output_norm.weight", np.ones(shape.hidden_size, np.float32)
    for layer_idx in range(shape.num_layers):
        prefix = f"blk.{layer_idx}."
        yield prefix + "attn_norm.weight", np.ones(shape.hidden_size, np.float32)
        yield prefix + "ffn_norm.weight", np.ones(shape.hidden_size, np.float32)
        if shape.family == "qwen3_moe":
            yield prefix + "attn_q_norm.weight", np.ones(shape.head_dim, np.float32)
            yield prefix + "attn_k_norm.weight", np.ones(shape.head_dim, np.float32)
        router = rng.standard_normal((shape.num_experts, shape.hidden_size), np.float32) * 2 / shape.hidden_size**0.5
        yield prefix + "ffn_gate_inp.weight", router


def _byte_tokens(vocab_size: int) -> list[str]:
    """A vocabulary of the 256 bytes as GPT-2 writes them, three specials and padding: enough for random tokens."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {byte: chr(byte) for byte in printable} | {byte: chr(256 + idx) for idx, byte in enumerate(others)}
    tokens = [names[byte] for byte in range(256)] + ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return tokens + [f"[PAD{idx}]" for idx in range(len(tokens), vocab_size)]


def _write_keys(writer: gguf.GGUFWriter, shape: Shape, block_format: str) -> None:
    writer.add_name(shape.name)
    writer.add_block_count(shape.num_layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.expert_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_rope_freq_base(1e6)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_expert_count(shape.num_experts)
    writer.add_expert_used_count(shape.top_k)
    writer.add_vocab_size(shape.vocab_size)
    file_types = {"Q4_0": "MOSTLY_Q4_0", "Q8_0": "MOSTLY_Q8_0", "Q3_K": "MOSTLY_Q3_K_S"}
    writer.add_file_type(gguf.LlamaFileType[file_types[block_format]])
    if shape.family == "mixtral":
        writer.add_tokenizer_model("no_vocab")
        return
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_expert_feed_forward_length(shape.expert_size)
    # fastllm loads no file without a tokenizer.
    tokens = _byte_tokens(shape.vocab_size)
    normal, control, unused = (int(gguf.TokenType[name]) for name in ("NORMAL", "CONTROL", "UNUSED"))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([normal] * 256 + [control] * 3 + [unused] * (len(tokens) - 259))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(258)
    writer.add_pad_token_id(256)
    writer.add_add_bos_token(False)
    writer.add_chat_template(
        "{% for m in messages %}<|im_start|>{{m.role}}\n{{m.content}}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def matrix_bytes(shape: Shape, block_format: str) -> int:
    """Bytes of all matrices of the file: nearly its size."""
    block_weights, type_bytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[block_format]]
    return shape.num_weights // block_weights * type_bytes


def write_gguf(path: Path, shape: Shape, block_format: str, seed: int = 0) -> Path:
    """Write the file, under another name until it is complete; the largest tensor is in memory at a time."""
    rng = np.random.default_rng(seed)
    part_path = path.with_suffix(".part")
    quantization = GGMLQuantizationType[block_format]
    writer = gguf.GGUFWriter(part_path, "llama" if shape.family == "mixtral" else "qwen3moe")
    try:
        _write_keys(writer, shape, block_format)
        plain = list(_plain_tensors(shape, rng))
        for name, values in plain:
            writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
        for matrices in _matrices(shape):
            packed_shape = gguf.quant_shape_to_byte_shape(matrices.shape, quantization)
            nbytes = int(np.prod(packed_shape, dtype=np.int64))
            writer.add_tensor_info(matrices.name, packed_shape, np.dtype(np.uint8), nbytes, raw_dtype=quantization)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, values in plain:
            writer.write_tensor_data(values)
        for matrices in _matrices(shape):
            writer.write_tensor_data(_packed(matrices, block_format, rng))
    finally:
        writer.close()
    os.replace(part_path, path)
    return path
