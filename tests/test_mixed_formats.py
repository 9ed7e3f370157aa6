"""``mixed:BITS``: the plan keeps to its bits, the pack to the plan, and the model to the weights so packed."""

import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from families import make_config
from family_runs import example_inputs, save_random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from loaded_models import check_health, loaded, make_pack
from quantized_checkpoints import read_tensors, write_checkpoint
from transformers import AutoModelForCausalLM, PreTrainedConfig

from moe_offload.cli.main import cli
from moe_offload.errors import ConfigError, FormatError
from moe_offload.offload.checkpoint.transformers_loading import auto_class
from moe_offload.offload.experts.containers import ExpertContainer, find_expert_containers
from moe_offload.offload.pack.manifest import PackManifest, read_manifest
from moe_offload.offload.pack.mixed import MixedWeight, canonical, mixed_bits, plan_mixed, weight_formats
from moe_offload.offload.pack.packer import pack_model
from moe_offload.offload.pack.synthetic import write_synthetic_pack
from moe_offload.offload.pack.writer import LayerWriter
from moe_offload.quant import get_format

WIDE = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 128}
BITS = {"nf3": 3, "nf4": 4, "int8": 8}


def containers_of(config: PreTrainedConfig) -> list[ExpertContainer]:
    with torch.device("meta"):
        return find_expert_containers(auto_class(config).from_config(config))


def average_bits(manifest: PackManifest) -> float:
    parts = [part for layer in manifest.layers for part in layer.parts if len(part.shape) > 1]
    return 8 * sum(part.size_bytes for part in parts) / sum(math.prod(part.shape) for part in parts)


def planned(manifest: PackManifest) -> list[dict[str, str]]:
    return [{part.name: part.format for part in layer.parts} for layer in manifest.layers]


# -- the plan --

WEIGHTS = st.lists(
    st.builds(
        MixedWeight,
        shape=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
        num_copies=st.integers(1, 300),
        sensitivity=st.floats(1e-6, 1e6),
    ),
    min_size=1,
    max_size=40,
)


def size_bits(weights: list[MixedWeight], formats: list[str]) -> float:
    num_bytes = sum(
        get_format(spec).nbytes(weight.shape) * weight.num_copies for weight, spec in zip(weights, formats, strict=True)
    )
    return 8 * num_bytes / sum(math.prod(weight.shape) * weight.num_copies for weight in weights)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(weights=WEIGHTS, bits=st.floats(3.13, 8.25), more=st.floats(0, 5))
def test_a_plan_meets_its_bits_and_with_more_no_weight_gets_fewer(weights, bits, more):
    try:
        formats = plan_mixed(weights, bits)
    except FormatError:
        smallest = [min(BITS, key=lambda spec: get_format(spec).nbytes(weight.shape)) for weight in weights]
        assert size_bits(weights, smallest) > bits
        return
    assert plan_mixed(weights, bits) == formats
    assert size_bits(weights, formats) <= bits * (1 + 1e-12)
    for fewer, now in zip(formats, plan_mixed(weights, bits + more), strict=True):
        assert BITS[fewer] <= BITS[now]


def test_bits_go_where_they_save_most():
    weights = [MixedWeight((512, 512), 8, sensitivity) for sensitivity in (1.0, 5.0, 1.0, 20.0)]
    assert plan_mixed(weights, 3.2) == ["nf3", "nf3", "nf3", "nf3"]
    assert plan_mixed(weights, 3.5) == ["nf3", "nf3", "nf3", "nf4"]
    assert plan_mixed(weights, 4.0) == ["nf3", "nf4", "nf3", "nf4"]
    assert plan_mixed(weights, 4.8) == ["nf3", "nf4", "nf3", "int8"]
    assert plan_mixed(weights, 8.25) == ["int8"] * 4


def test_down_and_the_first_layer_come_first():
    config = make_config("mixtral", hidden_size=256, intermediate_size=512, num_hidden_layers=8)
    formats = weight_formats(containers_of(config), "mixed:3.5")
    assert {layer["gate_up_proj"] for layer in formats} == {"nf3"}
    downs = [layer["down_proj"] for layer in formats]
    assert downs.count("nf4") == 7  # one more would take more than 3.5
    assert downs[0] == downs[-1] == "nf4"
    richer = weight_formats(containers_of(config), "mixed:3.7")
    assert richer[0] == {"gate_up_proj": "nf4", "down_proj": "nf4"}
    assert richer[3] == {"gate_up_proj": "nf3", "down_proj": "nf4"}


@pytest.mark.parametrize("spec", ["mixed:", "mixed:3", "mixed:9", "mixed:nan", "mixed:-4", "mixed:3.5x", "mixed:4,5"])
def test_bits_that_no_mixture_has_are_refused(spec, tmp_path):
    with pytest.raises(ConfigError, match=r"3\.13 to 8\.25"):
        pack_model(str(tmp_path), tmp_path / "pack", format=spec)


def test_too_few_bits_for_a_shape_are_refused_with_what_would_do(tmp_path):
    checkpoint = save_random_model(make_config("mixtral", **WIDE), tmp_path / "checkpoint", torch.bfloat16)
    with pytest.raises(FormatError, match=r"use mixed:3\.\d+ or more") as refusal:
        pack_model(str(checkpoint), tmp_path / "pack", format="mixed:3.2")
    assert not (tmp_path / "pack").exists()
    remedy = str(refusal.value).split("use ")[1].split(" ")[0]
    manifest = read_manifest(pack_model(str(checkpoint), tmp_path / "pack", format=remedy))
    assert {spec for layer in planned(manifest) for spec in layer.values()} == {"nf3"}


def test_one_spelling():
    assert canonical("mixed:3.50") == canonical("mixed:3.5") == "mixed:3.5"
    assert canonical("nf4") == "nf4"
    assert mixed_bits("nf4") is None
    assert mixed_bits("mixed:4") == 4


# -- the pack --


@torch.no_grad()
def logits_of(model: torch.nn.Module, config: PreTrainedConfig) -> torch.Tensor:
    return model(**example_inputs(config)).logits.clone()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_mixed_pack_computes_with_the_weights_as_planned(family, tmp_path):
    pack = make_pack(tmp_path, family, "mixed:4", **WIDE)
    manifest, config = read_manifest(pack), make_config(family, **WIDE)
    assert manifest.expert_format == "mixed:4"
    formats = weight_formats(containers_of(config), "mixed:4")
    assert planned(manifest) == formats
    assert len({tuple(layer.values()) for layer in formats}) > 1, "layers of more than one kind"
    assert 3.4 < average_bits(manifest) <= 4

    tensors = {key: value.float() for key, value in read_tensors(tmp_path / "checkpoint").items()}
    for key, value in tensors.items():
        if ".experts." in key:
            part = "down_proj" if key.endswith(("w2.weight", "down_proj.weight")) else "gate_up_proj"
            fmt = get_format(formats[int(key.split("layers.")[1].split(".")[0])][part])
            tensors[key] = fmt.dequantize(fmt.quantize(value.bfloat16()), tuple(value.shape), torch.float32)
    folder = write_checkpoint(tmp_path / "checkpoint", tmp_path / "through", tensors, None)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    expected = logits_of(plain, config)

    num_layers = len(manifest.layers)
    with loaded(pack, [8] * num_layers, prefetch="off", dtype="float32") as model:
        all_resident = logits_of(model.model, config)
        answer = model.generate("w5 w17 w80", max_new_tokens=6, temperature=0)
    assert float((all_resident - expected).norm() / expected.norm()) <= 1e-5
    with loaded(pack, [1] * num_layers, prefetch=1, dtype="float32") as model:
        assert torch.equal(logits_of(model.model, config), all_resident)
        assert model.generate("w5 w17 w80", max_new_tokens=6, temperature=0) == answer
        check_health(model)


def test_an_interrupted_mixed_pack_goes_on_by_the_same_plan(tmp_path, monkeypatch):
    checkpoint = save_random_model(make_config("mixtral", **WIDE), tmp_path / "checkpoint", torch.bfloat16)
    whole = pack_model(str(checkpoint), tmp_path / "whole", format="mixed:4")
    write_expert = LayerWriter.write_expert

    def stop_in_the_second_layer(self, expert_idx, data):
        if self._file.path.name == "experts-00001.safetensors" and expert_idx == 3:
            raise KeyboardInterrupt
        write_expert(self, expert_idx, data)

    pack = tmp_path / "pack"
    with monkeypatch.context() as patch:
        patch.setattr(LayerWriter, "write_expert", stop_in_the_second_layer)
        with pytest.raises(KeyboardInterrupt):
            pack_model(str(checkpoint), pack, format="mixed:4")
    first_layer = (pack / "experts-00000.safetensors").stat().st_mtime_ns
    pack_model(str(checkpoint), pack, format="mixed:4.0")
    assert (pack / "experts-00000.safetensors").stat().st_mtime_ns == first_layer
    files = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert {path.name: path.read_bytes() for path in pack.iterdir()} == files


def test_packs_under_the_cache_folder_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_OFFLOAD_HOME", str(tmp_path / "home"))
    checkpoint = save_random_model(make_config("mixtral", **WIDE), tmp_path / "checkpoint", torch.bfloat16)
    packs = [pack_model(str(checkpoint), format=spec) for spec in ("mixed:4", "mixed:4.00", "mixed:5")]
    assert [Path(pack).name.rpartition("-mixed-")[2] for pack in packs] == ["4", "4", "5"]


def test_a_synthetic_pack_can_be_mixed(tmp_path):
    config = make_config("mixtral", **WIDE)
    manifest = write_synthetic_pack(tmp_path / "pack", config, format="mixed:4.0")
    assert manifest.expert_format == "mixed:4"
    assert planned(manifest) == weight_formats(containers_of(config), "mixed:4")
    with loaded(tmp_path / "pack", [2] * len(manifest.layers)) as model:
        assert torch.isfinite(logits_of(model.model, config)).all()


def test_the_command_line_takes_and_checks_bits(tmp_path):
    checkpoint = save_random_model(make_config("mixtral", **WIDE), tmp_path / "checkpoint", torch.bfloat16)
    pack = ["pack", str(checkpoint), "--output", str(tmp_path / "pack")]
    refused = CliRunner().invoke(cli, [*pack, "--format", "mixed:2"])
    assert refused.exit_code == 2
    assert "3.13 to 8.25" in refused.output.replace("\n", " ")
    assert CliRunner().invoke(cli, [*pack, "--format", "mixed:BITS"]).exit_code == 2
    assert CliRunner().invoke(cli, [*pack, "--format", "mixed:4"]).exit_code == 0
    assert read_manifest(tmp_path / "pack").expert_format == "mixed:4"
