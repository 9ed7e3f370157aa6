"""Tiny quantised checkpoints as hubs have them, each with the plain checkpoint that it stands for."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from families import make_config
from family_runs import save_random_model
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """``folder`` holds the quantised weights, ``plain_folder`` what they dequantise to.

    There the dense weights are rounded as transformers rounds them, and the experts, which run on their codes, are not.
    """

    folder: Path
    plain_folder: Path
    plain: Tensors


def read_tensors(folder: Path) -> Tensors:
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


def write_checkpoint(template: Path, folder: Path, tensors: Tensors, quantization: dict[str, Any] | None) -> Path:
    """One file of ``tensors`` with the config of ``template``."""
    folder.mkdir()
    for path in template.glob("*.json"):
        if not path.name.endswith("index.json"):
            shutil.copy(path, folder)
    settings = json.loads((folder / "config.json").read_text())
    if quantization is not None:
        settings["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(settings))
    # clone: parts of one storage would be refused
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def _finish(base: Path, folder: Path, stored: Tensors, plain: Tensors, quantization: Any) -> QuantizedCheckpoint:
    return QuantizedCheckpoint(
        write_checkpoint(base, folder / "quantized", stored, quantization),
        write_checkpoint(base, folder / "plain", plain, None),
        plain,
    )


def gpt_oss_mxfp4(folder: Path) -> QuantizedCheckpoint:
    """gpt-oss: fused experts in blocks and scales, the rest in bf16."""
    config = make_config("gpt_oss", hidden_size=64, intermediate_size=96, head_dim=16)
    base = save_random_model(config, folder / "base", torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    stored: Tensors = {}
    plain: Tensors = {}
    for key, value in read_tensors(base).items():
        if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[key] = plain[key] = value
            continue
        num_experts, num_in, num_out = value.shape
        shape = (num_experts, num_out, num_in // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(121, 125, shape, dtype=torch.uint8, generator=generator)
        stored |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
        plain[key] = convert_moe_packed_tensors(blocks, scales).contiguous()
    return _finish(base, folder, stored, plain, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def _fp8(value: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and values of a matrix in blocks that may stick out of it."""
    num_rows, num_columns = value.shape
    grid = (-(-num_rows // block[0]), -(-num_columns // block[1]))
    scales = torch.empty(grid)
    full = torch.empty(value.shape)
    for i in range(grid[0]):
        for j in range(grid[1]):
            rows, columns = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scales[i, j] = value[rows, columns].float().abs().max() / 448
            full[rows, columns] = scales[i, j]
    codes = (value.float() / full).to(torch.float8_e4m3fn)
    return codes, scales, codes.float() * full


def _rounded(key: str, value: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return value if ".experts." in key else value.to(dtype)


def _deepseek_base(folder: Path) -> Path:
    return save_random_model(make_config("deepseek_v3", q_lora_rank=24), folder / "base", torch.bfloat16)


def deepseek_fp8(folder: Path, block: tuple[int, int] = (16, 16)) -> QuantizedCheckpoint:
    """DeepSeek-V3: every linear but the router and the head in blocks, 40 and 24 being no multiples of 16."""
    base = _deepseek_base(folder)
    stored: Tensors = {}
    plain: Tensors = {}
    for key, value in read_tensors(base).items():
        is_linear = value.dim() == 2 and "proj" in key
        if not is_linear:
            stored[key] = plain[key] = value
            continue
        stored[key], stored[f"{key}_scale_inv"], values = _fp8(value, block)
        plain[key] = _rounded(key, values)
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block),
    }
    return _finish(base, folder, stored, plain, quantization)


def deepseek_exponents(folder: Path, scale_dtype: torch.dtype) -> QuantizedCheckpoint:
    """Block FP8 whose scales are powers of two, stored as e8m0, as bytes or in bf16."""
    base = _deepseek_base(folder)
    stored: Tensors = {}
    plain: Tensors = {}
    for key, value in read_tensors(base).items():
        if value.dim() != 2 or "proj" not in key:
            stored[key] = plain[key] = value
            continue
        _, scales, _ = _fp8(value, (16, 16))
        exponents = scales.log2().ceil()
        full = exponents.exp2().repeat_interleave(16, 0)[: value.shape[0]]
        full = full.repeat_interleave(16, 1)[:, : value.shape[1]]
        stored[key] = (value.float() / full).to(torch.float8_e4m3fn)
        plain[key] = _rounded(key, stored[key].float() * full)
        raw = (exponents + 127).to(torch.uint8)
        stored[f"{key}_scale_inv"] = {
            torch.uint8: raw,
            torch.float8_e8m0fnu: raw.view(torch.float8_e8m0fnu),
            torch.bfloat16: exponents.exp2().to(torch.bfloat16),
        }[scale_dtype]
    quantization = {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [16, 16]}
    return _finish(base, folder, stored, plain, quantization)


def deepseek_fp4_experts(folder: Path) -> QuantizedCheckpoint:
    """As DeepSeek-V4 publishes: dense linears in FP8 with ``X.scale``, experts as MXFP4 in int8."""
    config = make_config("deepseek_v3", hidden_size=64, moe_intermediate_size=32)
    base = save_random_model(config, folder / "base", torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    stored: Tensors = {}
    plain: Tensors = {}
    for key, value in read_tensors(base).items():
        scale_key = key.removesuffix("weight") + "scale"
        if value.dim() != 2 or "proj" not in key:
            stored[key] = plain[key] = value
        elif ".experts." in key:
            num_rows, num_columns = value.shape
            packed = torch.randint(0, 256, (num_rows, num_columns // 2), dtype=torch.uint8, generator=generator)
            scales = torch.randint(121, 125, (num_rows, num_columns // 32), dtype=torch.uint8, generator=generator)
            stored[key], stored[scale_key] = packed.view(torch.int8), scales.view(torch.float8_e8m0fnu)
            blocks = packed.view(1, num_rows, -1, 16)
            plain[key] = convert_moe_packed_tensors(blocks, scales[None])[0].T.contiguous()
        else:
            stored[key], stored[scale_key], values = _fp8(value, (16, 16))
            plain[key] = _rounded(key, values)
    return _finish(base, folder, stored, plain, {"quant_method": "fp8", "weight_block_size": [16, 16]})


def mixtral_bnb4(
    folder: Path, quant_type: str = "nf4", nested: bool = True, dtype: torch.dtype = torch.bfloat16
) -> QuantizedCheckpoint:
    """Mixtral as bitsandbytes 4-bit checkpoints hold it: a linear for each expert, attention in 4 bits too."""
    config = make_config("mixtral", hidden_size=64, intermediate_size=128)
    base = save_random_model(config, folder / "base", dtype)
    stored: Tensors = {}
    plain: Tensors = {}
    for key, value in read_tensors(base).items():
        if value.dim() != 2 or not ("experts" in key or "self_attn" in key):
            stored[key] = plain[key] = value
            continue
        codes, state = bnb.quantize_4bit(value, quant_type=quant_type, compress_statistics=nested)
        stored[key] = codes
        stored |= {f"{key}.{name}": part for name, part in state.as_dict(packed=True).items()}
        state.dtype = torch.float32
        plain[key] = _rounded(key, bnb.dequantize_4bit(codes, state), dtype)
    quantization = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "llm_int8_skip_modules": ["lm_head", "gate"],
    }
    return _finish(base, folder, stored, plain, quantization)
