"""The files of random weights that peers are run on, read back by the library that defines the format."""

import math

import pytest

gguf = pytest.importorskip("gguf", reason="gguf comes with the extra 'demo'")

import numpy as np  # noqa: E402
from peer_runs.gguf_file import FORMATS, matrix_bytes, write_gguf  # noqa: E402
from peer_runs.shapes import SHAPES, Shape  # noqa: E402

MIXTRAL = Shape("tiny", "mixtral", 2, 256, 512, 4, 2, 4, 2, 64, 96, 1e-5)
QWEN3 = Shape("tiny", "qwen3_moe", 2, 256, 256, 6, 3, 4, 2, 64, 320, 1e-6)


def field(reader, name):
    return reader.fields[name].contents()


@pytest.mark.parametrize("block_format", FORMATS)
@pytest.mark.parametrize("shape", [MIXTRAL, QWEN3], ids=lambda shape: shape.family)
def test_file_has_the_tensors_of_the_shape(tmp_path, shape, block_format):
    path = write_gguf(tmp_path / "model.gguf", shape, block_format)
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    hidden, expert, experts = shape.hidden_size, shape.expert_size, shape.num_experts
    assert [int(size) for size in tensors["blk.1.ffn_gate_exps.weight"].shape] == [hidden, expert, experts]
    assert [int(size) for size in tensors["blk.1.ffn_down_exps.weight"].shape] == [expert, hidden, experts]
    assert [int(size) for size in tensors["blk.0.attn_k.weight"].shape] == [hidden, shape.num_kv_heads * shape.head_dim]
    assert [int(size) for size in tensors["output.weight"].shape] == [hidden, shape.vocab_size]
    assert [int(size) for size in tensors["blk.0.ffn_gate_inp.weight"].shape] == [hidden, experts]
    quantised = [tensor for tensor in reader.tensors if tensor.tensor_type.name == block_format]
    assert sum(int(tensor.n_elements) for tensor in quantised) == shape.num_weights
    assert sum(int(tensor.n_bytes) for tensor in quantised) == matrix_bytes(shape, block_format)
    architecture = field(reader, "general.architecture")
    assert field(reader, f"{architecture}.expert_used_count") == shape.top_k
    assert field(reader, f"{architecture}.block_count") == shape.num_layers


@pytest.mark.parametrize("block_format", FORMATS)
def test_matrices_keep_the_size_of_what_they_multiply(tmp_path, block_format):
    reader = gguf.GGUFReader(write_gguf(tmp_path / "model.gguf", MIXTRAL, block_format))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, std in {"token_embd.weight": 1.0, "blk.0.ffn_down_exps.weight": MIXTRAL.expert_size**-0.5}.items():
        weights = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
        assert weights.std() == pytest.approx(std, rel=0.05)
        assert abs(weights.mean()) < 0.1 * std


def test_experts_differ(tmp_path):
    reader = gguf.GGUFReader(write_gguf(tmp_path / "model.gguf", MIXTRAL, "Q4_0"))
    up = next(tensor.data for tensor in reader.tensors if tensor.name == "blk.0.ffn_up_exps.weight")
    assert len({up[expert_idx].tobytes() for expert_idx in range(MIXTRAL.num_experts)}) == MIXTRAL.num_experts


def test_vocabulary_has_as_many_tokens_as_the_shape(tmp_path):
    reader = gguf.GGUFReader(write_gguf(tmp_path / "model.gguf", QWEN3, "Q8_0"))
    tokens = field(reader, "tokenizer.ggml.tokens")
    assert len(tokens) == len(set(tokens)) == QWEN3.vocab_size
    assert len(field(reader, "tokenizer.ggml.token_type")) == QWEN3.vocab_size


def test_an_interrupted_file_is_not_taken_for_a_whole_one(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("peer_runs.gguf_file._packed", stop)
    with pytest.raises(KeyboardInterrupt):
        write_gguf(tmp_path / "model.gguf", MIXTRAL, "Q4_0")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize("shape", [MIXTRAL, QWEN3, *SHAPES.values()], ids=lambda shape: f"{shape.family}-{shape.name}")
def test_transformers_counts_the_same_weights(shape):
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape.transformers_config()))
    norms_and_routers = sum(
        math.prod(tensor.shape)
        for name, tensor in model.named_parameters()
        if "norm" in name or tensor.shape == (shape.num_experts, shape.hidden_size)
    )
    assert sum(tensor.numel() for tensor in model.parameters()) - norms_and_routers == shape.num_weights


def test_scales_are_finite_in_half_precision(tmp_path):
    reader = gguf.GGUFReader(write_gguf(tmp_path / "model.gguf", QWEN3, "Q3_K"))
    for tensor in reader.tensors:
        if tensor.tensor_type.name == "Q3_K":
            assert np.isfinite(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).all()
