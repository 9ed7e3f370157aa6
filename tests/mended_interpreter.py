"""Mends Triton's interpreter, which holds bf16 as 16 bits and multiplies these as if they were integers.

With Triton 3.6 to 3.8, ``tl.dot`` of bf16 is ``numpy.matmul`` of the bits, and a conversion from fp32 cuts where a GPU
rounds to the nearest. Other arithmetic on bf16, which no kernel here does, is on bits too, and stays so. It does not
know PTX at all.
"""

import functools
from typing import Any

import numpy as np
import torch
import triton.language as tl
from interpreted_ptx import interpret_ptx
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def mend_interpreter() -> None:
    """For all kernels that are interpreted from now on; once is enough."""
    if not hasattr(InterpreterBuilder.create_dot, "__wrapped__"):
        InterpreterBuilder.create_dot = _with_fp32_operands(InterpreterBuilder.create_dot)
        InterpreterBuilder.cast_impl = _with_rounding_to_bf16(InterpreterBuilder.cast_impl)
        interpret_ptx()


def _with_fp32_operands(create_dot: Any) -> Any:
    @functools.wraps(create_dot)
    def wrapped(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(builder, _in_fp32(a), _in_fp32(b), *rest)

    return wrapped


def _with_rounding_to_bf16(cast_impl: Any) -> Any:
    @functools.wraps(cast_impl)
    def wrapped(builder: Any, source: Any, dtype: Any) -> Any:
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast_impl(builder, source, dtype)
        bits = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.int16).numpy()
        return TensorHandle(bits.view(np.uint16), tl.bfloat16)

    return wrapped


def _in_fp32(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    bits = torch.from_numpy(np.array(operand.data).view(np.int16))
    return TensorHandle(bits.view(torch.bfloat16).float().numpy(), tl.float32)
