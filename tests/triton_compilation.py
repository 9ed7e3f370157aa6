"""Compiles the kernels for GPUs that are not here: a script, since a process either compiles or interprets."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from slot_slabs import GPT_OSS, SILU, random_slab
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from moe_offload.quant.activation import Activation
from moe_offload.quant.slot_kernels.triton_kernels import TritonKernels

_TYPES = {torch.uint8: "u8", torch.int32: "i32", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Bytes that a program may have, by compute capability.
_SHARED_BYTES = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 90: 227 << 10}


class Launches:
    """Stands in for what runs kernels: notes them instead."""

    def __init__(self) -> None:
        self.calls: list[tuple[JITFunction[Any], tuple[Any, ...], dict[str, Any]]] = []
        JITFunction.run = lambda kernel, *args, grid, warmup, **kwargs: self.calls.append((kernel, args, kwargs))


def compile_call(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], capability: int) -> None:
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    by_name = dict(zip(kernel.arg_names, args, strict=False))
    signature = {n: "*" + _TYPES[a.dtype] if isinstance(a, torch.Tensor) else "i32" for n, a in by_name.items()}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(signature)
        if signature[name].startswith("*") and name not in (kernel.do_not_specialize_on_alignment or ())
    }
    source = ASTSource(kernel, signature | dict.fromkeys(kwargs, "constexpr"), kwargs, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert built.metadata.shared <= _SHARED_BYTES[capability], (kernel, built.metadata.shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run([_CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    (stack_bytes,) = re.findall(r"STACK:(\d+)", usage)
    assert int(stack_bytes) <= 128, f"{kernel}: registers do not suffice: {usage}"


def main() -> None:
    launches = Launches()
    for spec, capability, activation, dtype in (
        ("nf4", 75, SILU, torch.float16),
        ("nf4", 90, SILU, torch.bfloat16),
        ("mxfp4", 86, GPT_OSS, torch.bfloat16),
        ("fp8", 80, SILU, torch.bfloat16),
        ("nf3", 80, Activation("relu", "none"), torch.bfloat16),
    ):
        kernels = TritonKernels(torch.device("cpu"))
        kernels._capability = divmod(capability, 10)
        slab = random_slab(spec, hidden=2880, inner=1024, num_slots=1, activation=activation, bias="bf16")
        slots, rows = torch.zeros(1, 8, dtype=torch.int32), torch.arange(1024, dtype=torch.int32)
        x, weights = torch.zeros(1, 2880, dtype=dtype), torch.zeros(1, 8)
        kernels.decode_layer(slab.mlp, slab.data, slots, x, weights, x)
        if spec == "nf4":
            kernels.combine(torch.zeros(1, 8, 2880), slots, weights, x)
        many = x.expand(1024, -1).contiguous()
        kernels.grouped_experts(slab.mlp, slab.data, slots[0, :1], rows[:2], many, rows, many, rows)
        for call in launches.calls:
            compile_call(*call, capability)
        launches.calls.clear()
        print(spec, capability, "ok", flush=True)


if __name__ == "__main__":
    main()
