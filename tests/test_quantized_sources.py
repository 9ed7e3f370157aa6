"""Checkpoints that are already quantised keep their bits in a pack, and the model says what their values say."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import make_config
from family_runs import example_inputs, load_smallest, save_random_model
from quantized_checkpoints import (
    QuantizedCheckpoint,
    deepseek_exponents,
    deepseek_fp4_experts,
    deepseek_fp8,
    gpt_oss_mxfp4,
    mixtral_bnb4,
    read_tensors,
    write_checkpoint,
)
from transformers import AutoModelForCausalLM

from moe_offload.errors import SourceError, UnsupportedQuantizationError
from moe_offload.offload.checkpoint.source_quantization import codec_for
from moe_offload.offload.pack.manifest import read_manifest
from moe_offload.offload.pack.packer import pack_model
from moe_offload.quant import get_format

# name -> (builder, the formats that its experts' weights have in the pack)
SOURCES = {
    "gpt-oss mxfp4": (gpt_oss_mxfp4, {"mxfp4"}),
    "deepseek fp8": (deepseek_fp8, {"fp8-16x16"}),
    "deepseek fp8, one scale a tensor": (lambda folder: deepseek_fp8(folder, (64, 64)), {"fp8-64x64"}),
    "deepseek fp8, e8m0": (lambda folder: deepseek_exponents(folder, torch.float8_e8m0fnu), {"fp8-16x16"}),
    "deepseek fp8, e8m0 bytes": (lambda folder: deepseek_exponents(folder, torch.uint8), {"fp8-16x16"}),
    "deepseek fp8, bf16 scales": (lambda folder: deepseek_exponents(folder, torch.bfloat16), {"fp8-16x16"}),
    "deepseek fp8, fp4 experts": (deepseek_fp4_experts, {"mxfp4"}),
    "bnb nf4 nested": (mixtral_bnb4, {"bnb-nf4-64"}),
    "bnb nf4": (lambda folder: mixtral_bnb4(folder, nested=False), {"bnb-nf4-64"}),
    "bnb fp4 float16": (lambda folder: mixtral_bnb4(folder, "fp4", True, torch.float16), {"bnb-fp4-64"}),
}


def expert_values(folder: Path, layer_idx: int, expert_idx: int) -> dict[str, torch.Tensor]:
    """The weights of one expert of a pack, dequantised in fp32; pieces of a fused one are stacked."""
    layer = read_manifest(folder).layers[layer_idx]
    expert = layer.experts[expert_idx]
    blob = (folder / expert.file).read_bytes()[expert.offset_bytes :][: layer.slot_bytes]
    data = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
    values: dict[str, list[torch.Tensor]] = {}
    for part in layer.parts:
        packed = data[part.offset_bytes : part.offset_bytes + part.size_bytes]
        value = get_format(part.format).dequantize(packed, part.shape, torch.float32)
        values.setdefault(part.name.partition("#")[0], []).append(value)
    return {name: torch.cat(pieces) for name, pieces in values.items()}


def expected_values(plain: dict[str, torch.Tensor], layer_idx: int, expert_idx: int) -> dict[str, torch.Tensor]:
    """The same from the plain tensors, by the layout of each family."""
    first_moe_layer = next(i for i in range(9) if any(f"layers.{i}." in k and ".experts." in k for k in plain))
    layer = f"model.layers.{layer_idx + first_moe_layer}."
    fused = {k.rpartition(".")[2]: v[expert_idx] for k, v in plain.items() if layer in k and ".experts.gate_up" in k}
    fused |= {k.rpartition(".")[2]: v[expert_idx] for k, v in plain.items() if layer in k and ".experts.down" in k}
    if fused:
        return {name: (value.T if value.dim() == 2 else value).float() for name, value in fused.items()}
    expert = {k.split(".")[-2]: v for k, v in plain.items() if layer in k and f".experts.{expert_idx}." in k}
    gate, up, down = (
        expert.get(a, expert.get(b)) for a, b in [("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")]
    )
    return {"gate_up_proj": torch.cat([gate, up]).float(), "down_proj": down.float()}


@torch.no_grad()
def reference_logits(folder: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    return model(**inputs).logits


def packed_logits(folder: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with load_smallest(folder) as offloaded, torch.no_grad():
        return offloaded.model(**inputs).logits.clone()


@pytest.mark.parametrize("name", SOURCES)
def test_a_quantised_checkpoint_keeps_its_bits(name, tmp_path):
    build, formats = SOURCES[name]
    source: QuantizedCheckpoint = build(tmp_path)
    pack = pack_model(str(source.folder), tmp_path / "pack")
    manifest = read_manifest(pack)
    assert (manifest.expert_format, manifest.dense_format) == ("source", "source")
    assert {part.format for layer in manifest.layers for part in layer.parts if len(part.shape) == 2} == formats
    for layer_idx, layer in enumerate(manifest.layers):
        for expert_idx in (0, layer.num_experts - 1):
            packed = expert_values(pack, layer_idx, expert_idx)
            expected = expected_values(source.plain, layer_idx, expert_idx)
            assert set(packed) == set(expected)
            for part, value in packed.items():
                assert torch.equal(value, expected[part]), (layer_idx, expert_idx, part)
    inputs = example_inputs(make_config("mixtral"))
    expected_logits = reference_logits(source.plain_folder, inputs)
    logits = packed_logits(pack, inputs)
    assert float((logits - expected_logits).abs().max()) <= 2e-5 * float(expected_logits.abs().max())


@pytest.mark.parametrize("name", ["gpt-oss mxfp4", "deepseek fp8", "bnb nf4 nested"])
def test_a_quantised_checkpoint_can_be_packed_to_another_format(name, tmp_path):
    """To exactly what the plain checkpoint in 16 bits would be packed to."""
    build, _ = SOURCES[name]
    source: QuantizedCheckpoint = build(tmp_path)
    rounded = {k: v.to(torch.bfloat16) if v.dtype == torch.float32 else v for k, v in source.plain.items()}
    plain = write_checkpoint(source.plain_folder, tmp_path / "rounded", rounded, None)
    packs = [
        pack_model(str(folder), tmp_path / f"pack-{folder.name}", format="nf4") for folder in (source.folder, plain)
    ]
    manifests = [read_manifest(pack) for pack in packs]
    assert manifests[0].expert_format == "nf4"
    assert {part.format for layer in manifests[0].layers for part in layer.parts if len(part.shape) == 2} == {"nf4"}
    assert [layer.checksums for layer in manifests[0].layers] == [layer.checksums for layer in manifests[1].layers]
    with load_smallest(packs[0]) as offloaded, torch.no_grad():
        assert torch.isfinite(offloaded.model(**example_inputs(make_config("mixtral"))).logits).all()


def test_the_format_that_a_checkpoint_is_in_keeps_its_bits_too(tmp_path):
    source = gpt_oss_mxfp4(tmp_path)
    packs = [pack_model(str(source.folder), tmp_path / spec, format=spec) for spec in ("source", "mxfp4")]
    first, second = (read_manifest(pack) for pack in packs)
    assert [layer.checksums for layer in first.layers] == [layer.checksums for layer in second.layers]


def test_a_plain_checkpoint_is_not_kept_by_auto(tmp_path):
    pack = pack_model(str(save_random_model(make_config("mixtral"), tmp_path / "checkpoint")), tmp_path / "pack")
    assert read_manifest(pack).expert_format == "nf4"


def test_blocks_that_cross_rows_are_dequantised_in_their_own_dtype(tmp_path):
    """bitsandbytes counts its blocks over the flat weight; ours end with a row."""
    source = mixtral_bnb4(tmp_path, dtype=torch.float16)
    settings = json.loads((source.folder / "config.json").read_text())
    narrow = save_random_model(
        make_config("mixtral", hidden_size=32, intermediate_size=128), tmp_path / "narrow", torch.float16
    )
    import bitsandbytes.functional as bnb

    stored, plain = {}, {}
    for key, value in read_tensors(narrow).items():
        stored[key] = plain[key] = value
        if "experts" in key:
            stored[key], state = bnb.quantize_4bit(value, quant_type="nf4", compress_statistics=False)
            stored |= {f"{key}.{name}": part for name, part in state.as_dict(packed=True).items()}
            plain[key] = bnb.dequantize_4bit(stored[key], state)
    folder = write_checkpoint(narrow, tmp_path / "crossing", stored, settings["quantization_config"])
    pack = pack_model(str(folder), tmp_path / "pack")
    parts = read_manifest(pack).layers[0].parts
    # w1 and w3 are [128, 32]: two rows a block; w2 is [32, 128] and keeps its bits
    assert {part.name: part.format for part in parts} == {"gate_up_proj": "fp16", "down_proj": "bnb-nf4-64"}
    expected = expected_values(plain, 0, 3)
    packed = expert_values(pack, 0, 3)
    assert torch.equal(packed["gate_up_proj"], expected["gate_up_proj"])
    assert torch.equal(packed["down_proj"].half(), expected["down_proj"].half())


REFUSED = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "float-quantized"},
    "bitsandbytes 8-bit": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "hqq": {"quant_method": "hqq"},
    "unknown": {"some": "thing"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_methods_are_refused_by_name(name, tmp_path):
    base = save_random_model(make_config("mixtral"), tmp_path / "base", torch.bfloat16)
    folder = write_checkpoint(base, tmp_path / "checkpoint", read_tensors(base), REFUSED[name])
    with pytest.raises(UnsupportedQuantizationError, match=name) as refusal:
        pack_model(str(folder), tmp_path / "pack")
    assert "fp8, mxfp8, mxfp4, bitsandbytes" in str(refusal.value)
    assert not (tmp_path / "pack").exists()


def test_weights_that_do_not_fit_their_scales_are_refused(tmp_path):
    source = deepseek_fp8(tmp_path)
    stored = read_tensors(source.folder)
    key = "model.layers.1.mlp.experts.2.up_proj.weight_scale_inv"
    stored[key] = torch.ones(5, 2)
    folder = write_checkpoint(source.folder, tmp_path / "odd", stored, None)
    with pytest.raises(SourceError, match=r"experts\.2\.up_proj\.weight .*\[5, 2\] scales"):
        pack_model(str(folder), tmp_path / "pack")


class _Tensors:
    """Shards in memory."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        self.tensors = tensors
        self.shard_of = dict.fromkeys(tensors, 0)

    def read(self, key: str, rows: slice | None = None) -> torch.Tensor:
        return self.tensors[key] if rows is None else self.tensors[key][rows]

    def entry(self, key: str) -> SimpleNamespace:
        return SimpleNamespace(dtype=self.tensors[key].dtype, shape=tuple(self.tensors[key].shape))


def test_fused_fp8_experts_are_read_one_at_a_time():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(3, 8, 6, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 2, 3, generator=generator)
    codec = codec_for(_Tensors(w=codes, w_scale_inv=scales), {"quant_method": "fp8"})
    expected = codes.float() * scales.repeat_interleave(4, 1).repeat_interleave(2, 2)
    assert torch.equal(codec.decode("w", None), expected.to(torch.bfloat16))
    assert torch.equal(codec.decode("w", slice(1, 2)), expected[1:2].to(torch.bfloat16))
    packed = codec.encode_exactly("w", 2, transposed=False)
    assert packed.format == "fp8-4x2"
    assert torch.equal(get_format(packed.format).dequantize(packed.data, packed.shape, torch.float32), expected[2])
    assert codec.encode_exactly("w", 2, transposed=True) is None


def test_one_scale_for_each_fused_expert():
    codes = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    codec = codec_for(_Tensors(w=codes, w_scale_inv=torch.tensor([[1.0], [2.0], [3.0]])), {"quant_method": "fp8"})
    expected = codes.float() * torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    assert torch.equal(codec.decode("w", None), expected.to(torch.bfloat16))
