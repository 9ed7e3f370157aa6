"""Attention of a prompt's tokens in one call to the C++ kernels: bf16, sums in fp32."""

import ctypes

import torch
from torch import Tensor

from moe_offload.quant import kernels
from moe_offload.quant.threads import num_threads

_MAX_VALUE_DIM = 256  # quant/csrc/prompt_attention.h


class _Heads(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("head", ctypes.c_int64), ("row", ctypes.c_int64))


class _Attention(ctypes.Structure):
    _fields_ = (
        ("queries", _Heads),
        ("keys", _Heads),
        ("values", _Heads),
        ("out", ctypes.c_void_p),
        ("begin", ctypes.c_void_p),
        ("end", ctypes.c_void_p),
        ("num_queries", ctypes.c_int64),
        ("num_keys", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("key_dim", ctypes.c_int64),
        ("value_dim", ctypes.c_int64),
        ("scaling", ctypes.c_float),
    )


def attends_prompts(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attend_prompt` can take these: ``[1, heads, tokens, dim]`` in bf16, on this machine, of known sizes."""
    tensors = (query, key, value)
    if not kernels.usable(*tensors) or any(
        t.dtype != torch.bfloat16 or t.dim() != 4 or t.shape[0] != 1 or t.stride(3) != 1 for t in tensors
    ):
        return False
    fits = (
        query.shape[1] % key.shape[1] == 0
        and key.shape[1:3] == value.shape[1:3]
        and query.shape[3] == key.shape[3]
        and key.shape[3] % 2 == 0
        and value.shape[3] % 32 == 0
        and value.shape[3] <= _MAX_VALUE_DIM
    )
    function, isa = kernels.entry("moe_offload_attends_prompts")
    return fits and bool(function(isa))


def attend_prompt(query: Tensor, key: Tensor, value: Tensor, begin: Tensor, end: Tensor, scaling: float) -> Tensor:
    """``[1, tokens, heads, value dim]``: query i attends to keys ``begin[i]`` to ``end[i]``, at least one.

    ``begin`` and ``end``: int32 ``[tokens]``. Heads of ``query`` share those of ``key`` and ``value`` in equal groups.
    """
    _, num_heads, num_queries, key_dim = query.shape
    _, num_kv_heads, num_keys, value_dim = value.shape
    out = query.new_empty(1, num_queries, num_heads, value_dim)
    attention = _Attention(
        *(_Heads(t.data_ptr(), t.stride(1), t.stride(2)) for t in (query, key, value)),
        out.data_ptr(),
        begin.data_ptr(),
        end.data_ptr(),
        num_queries,
        num_keys,
        num_heads,
        num_kv_heads,
        key_dim,
        value_dim,
        scaling,
    )
    function, _ = kernels.entry("moe_offload_attend_prompt")
    if function(ctypes.byref(attention), num_threads()):
        raise MemoryError(f"no memory to arrange the keys and values of {num_keys} tokens")
    return out
