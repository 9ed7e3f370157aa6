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
_SHARED_BYTES = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}


class Launches:
    """Stands in for what runs kernels: notes them instead."""

    def __init__(self) -> None:
        self.calls: list[tuple[JITFunction[Any], tuple[Any, ...], dict[str, Any]]] = []
        JITFunction.run = lambda kernel, *args, grid, warmup, **kwargs: self.calls.append((kernel, args, kwargs))


def compile_call(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], capability: int) -> str:
    """The machine code, one instruction a line."""
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
        usage, code = (
            subprocess.run([_CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    (stack_bytes,) = re.findall(r"STACK:(\d+)", usage)
    assert int(stack_bytes) <= 128, f"{kernel}: registers do not suffice: {usage}"
    return code


def longest_loop(code: str) -> int:
    """Instructions from where a jump backwards leads to the jump."""
    instructions = [(int(place, 16), text) for place, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", code)]
    jumps = [(place, re.search(r"\bBRA\b.* (0x[0-9a-f]+)", text)) for place, text in instructions]
    bodies = [(int(jump[1], 16), place) for place, jump in jumps if jump and int(jump[1], 16) < place]
    return max(sum(first <= place <= last for place, _ in instructions) for first, last in bodies)


def check_instructions(kernel: Any, kwargs: dict[str, Any], code: str, most: float) -> None:
    """Those of a lane for a weight, in the loop of a decode step's second product."""
    if kernel.__name__ == "decode_down":
        num_weights = kwargs["ROWS"] * kwargs["STEP"] * kwargs["DOWN"].unit / 32
        count = longest_loop(code) / num_weights
        print(f"{count:.1f} instructions a weight")
        assert count <= most, f"{count} instructions a weight"


def main() -> None:
    launches = Launches()
    for spec, capability, activation, dtype, most_instructions in (
        ("nf4", 75, SILU, torch.bfloat16, 4.1),
        ("nf4", 90, SILU, torch.bfloat16, 4.1),
        ("mxfp4", 86, GPT_OSS, torch.bfloat16, 4.2),
        ("fp8", 75, SILU, torch.bfloat16, 11.5),
        ("fp8", 89, SILU, torch.bfloat16, 4.6),
        ("nf3", 80, Activation("relu", "none"), torch.bfloat16, 7.8),
        ("bf16", 120, SILU, torch.bfloat16, 5.5),
    ):
        kernels = TritonKernels(torch.device("cpu"))
        kernels._capability = divmod(capability, 10)
        slab = random_slab(
            spec, hidden=2880, inner=4096, num_slots=1, activation=activation, bias="bf16", is_empty=True
        )
        slots, rows = torch.zeros(1, 8, dtype=torch.int32), torch.arange(1024, dtype=torch.int32)
        x, weights = torch.zeros(1, 2880, dtype=dtype), torch.zeros(1, 8)
        kernels.decode_layer(slab.mlp, slab.data, slots, x, weights, x)
        if spec == "nf4":
            kernels.combine(torch.zeros(1, 8, 2880), slots, weights, x)
        many = x.expand(1024, -1).contiguous()
        kernels.grouped_experts(slab.mlp, slab.data, slots[0, :1], rows[:2], many, rows, many, rows)
        for kernel, args, kwargs in launches.calls:
            code = compile_call(kernel, args, kwargs, capability)
            check_instructions(kernel, kwargs, code, most_instructions)
        launches.calls.clear()
        print(spec, capability, "ok", flush=True)


if __name__ == "__main__":
    main()
