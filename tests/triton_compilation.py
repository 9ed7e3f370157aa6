"""Compiles the kernels for GPUs that are not here: a script, since a process either compiles or interprets."""

import re
from typing import Any

import torch
from gpu_instructions import Launches, compiled, longest_loop
from slot_slabs import GPT_OSS, SILU, random_slab

from moe_offload.quant.activation import Activation
from moe_offload.quant.slot_kernels.triton_kernels import TritonKernels

# Bytes that a program may have, by compute capability.
_SHARED_BYTES = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}


def check(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], capability: int, most: float) -> None:
    """That it fits, that tables of lanes stay where they are, and how many instructions a weight takes.

    At most ``most`` in a decode step's second product.
    """
    built = compiled(kernel, args, kwargs, capability)
    assert built.shared_bytes <= _SHARED_BYTES[capability], (kernel, built.shared_bytes)
    assert built.stack_bytes <= 128, f"{kernel}: registers do not suffice: {built.stack_bytes} bytes beside them"
    tables = re.findall(r'inline_asm "[^"]*shfl[^"]*" {[^}]*} %\w+, (%\w+) :', built.layouts)
    assert bool(tables) == ("shfl.sync" in built.layouts)
    for table in tables:  # a register of each lane's own: what exchanged or copied it between lanes would ruin it
        assert re.search(rf"{table} = tt.splat ", built.layouts), f"{kernel}: a table of lanes is no scalar"
    if kernel.__name__ == "decode_down":
        num_weights = kwargs["ROWS"] * kwargs["STEP"] * kwargs["DOWN"].unit / 32
        count = len(longest_loop(built.code)) / num_weights
        assert count <= most, f"{count} instructions a weight"


def main() -> None:
    launches = Launches()
    for spec, capability, activation, dtype, most_instructions in (
        ("nf4", 75, SILU, torch.bfloat16, 4.5),
        ("nf4", 90, SILU, torch.bfloat16, 4.5),
        ("mxfp4", 86, GPT_OSS, torch.bfloat16, 4.5),
        ("fp8", 75, SILU, torch.bfloat16, 12),
        ("fp8", 89, SILU, torch.bfloat16, 5),
        ("nf3", 80, Activation("relu", "none"), torch.bfloat16, 8),
        ("bf16", 120, SILU, torch.bfloat16, 6),
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
        for call in launches.calls:
            check(*call, capability, most_instructions)
        launches.calls.clear()
        print(spec, capability, "ok", flush=True)


if __name__ == "__main__":
    main()
