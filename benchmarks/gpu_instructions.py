"""What decode kernels cost a GPU that is not here: instructions a weight, counted in the machine code they compile to.

    python benchmarks/gpu_instructions.py [--format nf4]

A model, no measurement: a loop's instructions, by the unit that carries them out, against what a multiprocessor starts
in a cycle; and how busy that keeps it while the GPU's memory delivers weights at its full rate. Up to 100 % the memory
can be what decides; waiting for memory, for other warps and for the last programs to end is not in it.
"""

import argparse
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from moe_offload.quant import get_format
from moe_offload.quant.activation import Activation
from moe_offload.quant.slot_kernels import SlotMlp, SlotPart
from moe_offload.quant.slot_kernels.triton_kernels import TritonKernels

FORMATS = ("nf4", "int4", "mxfp4", "nf3", "int8", "fp8", "bf16")
HIDDEN, INNER, TOP_K = 4096, 14336, 2  # Mixtral's
_TYPES = {torch.uint8: "u8", torch.int32: "i32", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Lanes a cycle of a multiprocessor, from the CUDA C++ Programming Guide's table of arithmetic throughput.
_LANES = {"all": 128, "shuffle": 32, "integer": 64, "float": 128}
_FLOAT_LANES_OF_AMPERE = 64  # of compute capability 8.0
_UNITS = {"SHFL": "shuffle"} | dict.fromkeys(("FFMA", "FADD", "FMUL", "IMAD", "HADD2", "HFMA2"), "float")
_UNITS |= dict.fromkeys(("LOP3", "SHF", "PRMT", "IADD3", "LEA", "SEL", "SGXT", "F2FP", "ISETP"), "integer")


@dataclass(frozen=True)
class Gpu:
    """By its data sheet."""

    name: str
    capability: int
    num_multiprocessors: int
    clock_hz: float
    memory_bytes_per_s: float


GPUS = (
    Gpu("H100 SXM", 90, 132, 1.7e9, 3.35e12),
    Gpu("A100 80 GB", 80, 108, 1.41e9, 2.04e12),
    Gpu("RTX 4090", 89, 128, 2.52e9, 1.008e12),
    Gpu("RTX 3060", 86, 28, 1.78e9, 0.36e12),
)


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code, what that was before the layouts of tensors were lowered, and what a program takes."""

    code: str
    layouts: str
    registers: int
    stack_bytes: int
    shared_bytes: int


class Launches:
    """Stands in for what runs kernels: notes them instead."""

    def __init__(self) -> None:
        self.calls: list[tuple[JITFunction[Any], tuple[Any, ...], dict[str, Any]]] = []
        JITFunction.run = lambda kernel, *args, grid, warmup, **kwargs: self.calls.append((kernel, args, kwargs))


def compiled(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], capability: int) -> Compiled:
    """A noted call, built for a GPU of a compute capability."""
    options = {name: kwargs[name] for name in ("num_warps", "num_stages") if name in kwargs}
    constants = {name: value for name, value in kwargs.items() if name not in options}
    by_name = dict(zip(kernel.arg_names, args, strict=False))
    signature = {n: "*" + _TYPES[a.dtype] if isinstance(a, torch.Tensor) else "i32" for n, a in by_name.items()}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(signature)
        if signature[name].startswith("*") and name not in (kernel.do_not_specialize_on_alignment or ())
    }
    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([_CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack_bytes = (int(re.findall(rf"{name}:(\d+)", usage)[0]) for name in ("REG", "STACK"))
    return Compiled(code, built.asm["ttgir"], registers, stack_bytes, built.metadata.shared)


def longest_loop(code: str) -> list[str]:
    """The names of the instructions from where a jump backwards leads to the jump."""
    instructions = [(int(place, 16), text) for place, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", code)]
    jumps = [(place, re.search(r"\bBRA\b.* (0x[0-9a-f]+)", text)) for place, text in instructions]
    loops = [(int(jump[1], 16), place) for place, jump in jumps if jump and int(jump[1], 16) < place]
    bodies = [[text for place, text in instructions if first <= place <= last] for first, last in loops]
    return [re.sub(r"^@\S+ ", "", text).split()[0].split(".")[0] for text in max(bodies, key=len)]


def count_by_unit(loop: list[str], num_weights: float) -> Counter[str]:
    """A lane's instructions for a weight: all, and those of each unit that may be short."""
    counts = Counter({"all": len(loop)}) + Counter(_UNITS[name] for name in loop if name in _UNITS)
    return Counter({unit: count / num_weights for unit, count in counts.items()})  # type: ignore[misc]


def busy(gpu: Gpu, counts: Counter[str], bytes_per_weight: float) -> tuple[float, str]:
    """The share of its cycles that the busiest unit needs while memory delivers at its full rate, and which that is."""
    weights_per_cycle = gpu.memory_bytes_per_s / bytes_per_weight / (gpu.num_multiprocessors * gpu.clock_hz)
    lanes = _LANES | ({"float": _FLOAT_LANES_OF_AMPERE} if gpu.capability == 80 else {})
    return max((weights_per_cycle * count / lanes[unit], unit) for unit, count in counts.items())


def decode_up_call(spec: str, capability: int, launches: Launches) -> tuple[Any, Any, Any]:
    """The launch of a decode step that multiplies gates and ups."""
    weight_format = get_format(spec)
    up = SlotPart(weight_format, (2 * INNER, HIDDEN), 0)
    down = SlotPart(weight_format, (HIDDEN, INNER), weight_format.nbytes(up.shape))
    slot_bytes = -(-(down.offset_bytes + weight_format.nbytes(down.shape)) // 4096) * 4096
    kernels = TritonKernels(torch.device("cpu"))
    kernels._capability = divmod(capability, 10)
    slab = torch.empty(1, slot_bytes, dtype=torch.uint8)
    slots, x = torch.zeros(1, TOP_K, dtype=torch.int32), torch.zeros(1, HIDDEN, dtype=torch.bfloat16)
    mlp = SlotMlp((up,), down, Activation("sigmoid"))
    kernels.decode_experts(mlp, slab, slots, x, torch.empty(1, TOP_K, HIDDEN))
    first, _ = launches.calls
    launches.calls.clear()
    return first


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", action="append", choices=FORMATS, help="count this one; may be given again")
    options = parser.parse_args(arguments)
    launches = Launches()
    print(f"Triton {triton.__version__}\n")
    print("| format | instructions | shuffles | integer | registers | " + " | ".join(gpu.name for gpu in GPUS) + " |")
    print("| --- " * (5 + len(GPUS)) + "|")
    for spec in options.format or FORMATS:
        cells = []
        for gpu in GPUS:
            kernel, args, kwargs = decode_up_call(spec, gpu.capability, launches)
            built = compiled(kernel, args, kwargs, gpu.capability)
            num_weights = 2 * kwargs["ROWS"] * kwargs["STEP"] * kwargs["GATE"].unit / 32
            counts = count_by_unit(longest_loop(built.code), num_weights)
            if not cells:
                cells = [f"{counts[unit]:.1f}" for unit in ("all", "shuffle", "integer")] + [str(built.registers)]
            share, unit = busy(gpu, counts, get_format(spec).bits_per_weight() / 8)
            cells.append(f"{share:.0%} ({unit})")
        print(f"| {spec} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
