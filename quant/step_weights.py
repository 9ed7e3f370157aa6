"""Weights of the dense part of a decode step, as they are handed over and as the C++ kernels take them."""

import ctypes
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moe_offload.quant import kernels
from moe_offload.quant.kernels import DTYPES, PackedWeight, packed_weight
from moe_offload.quant.layout import PackedLayout


@dataclass(frozen=True)
class RawWeight:
    """A contiguous weight [out, in] in a float dtype, and a bias [out] or None."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class PackedProjection:
    """A weight packed in a blocked format, and a bias [out] or None."""

    packed: Tensor
    layout: PackedLayout
    code: int
    bias: Tensor | None = None


@dataclass(frozen=True)
class Norm:
    """``x / rms(x) * (weight + offset) [width]``; ``rounds_first``: to the dtype of x before that too, as in Llama."""

    weight: Tensor
    epsilon: float
    rounds_first: bool
    offset: float = 0.0


class RawWeightStructure(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    )


class ProjectionStructure(ctypes.Structure):
    _fields_ = (
        ("packed", PackedWeight),
        ("raw", RawWeightStructure),
        ("bias", ctypes.c_void_p),
        ("bias_dtype", ctypes.c_int32),
    )


class NormStructure(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("epsilon", ctypes.c_float),
        ("offset", ctypes.c_float),
        ("weight_dtype", ctypes.c_int32),
        ("rounds_first", ctypes.c_int32),
    )


class ConvolutionStructure(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("kernel_size", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    )


def entry(name: str, arguments: tuple[Any, ...]) -> tuple[Any, int]:
    """A function of the library that takes these arguments, and the instruction set that it takes first."""
    function, isa = kernels.entry(name)
    if function.argtypes is not arguments:
        function.argtypes = arguments
    return function, isa


def check(status: int) -> None:
    """Raise what a call's status stands for."""
    if status:
        raise MemoryError("no memory for the activations of a decode step")


def vector(tensor: Tensor | None) -> tuple[int | None, int]:
    """The address of a vector that may be missing, and its dtype."""
    return (None, 0) if tensor is None else (tensor.data_ptr(), DTYPES[tensor.dtype])


def raw_weight_structure(weight: Tensor) -> RawWeightStructure:
    """A contiguous weight [out, in]."""
    return RawWeightStructure(weight.data_ptr(), *weight.shape, DTYPES[weight.dtype])


def norm_structure(norm: Norm | None) -> NormStructure:
    """A norm; one without a weight for none."""
    if norm is None:
        return NormStructure()
    weight = norm.weight
    dtype = DTYPES[weight.dtype]
    return NormStructure(weight.data_ptr(), weight.shape[0], norm.epsilon, norm.offset, dtype, norm.rounds_first)


def projection_structure(projection: RawWeight | PackedProjection | None) -> ProjectionStructure:
    """A linear layer; one without a weight for none."""
    if projection is None:
        return ProjectionStructure()
    bias = vector(projection.bias)
    if isinstance(projection, RawWeight):
        return ProjectionStructure(PackedWeight(), raw_weight_structure(projection.weight), *bias)
    packed = packed_weight(projection.packed, projection.layout, projection.code)
    return ProjectionStructure(packed, RawWeightStructure(), *bias)


def convolution_structure(weight: Tensor, bias: Tensor | None = None) -> ConvolutionStructure:
    """A filter for each channel [channels, kernel_size], and a bias [channels] in its dtype or None."""
    return ConvolutionStructure(weight.data_ptr(), vector(bias)[0], weight.shape[1], DTYPES[weight.dtype])
