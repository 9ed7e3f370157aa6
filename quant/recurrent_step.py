"""One token through a layer that keeps a convolution's last tokens and a state, in one call to the C++ kernels."""

import ctypes

import torch
from torch import Tensor

from moe_offload.quant.step_weights import check, entry
from moe_offload.quant.threads import num_threads

_ARGUMENTS = (
    ctypes.c_int,  # instruction set
    ctypes.c_void_p,  # layer
    ctypes.c_void_p,  # x
    ctypes.c_void_p,  # past
    ctypes.c_void_p,  # state
    ctypes.c_void_p,  # out
    ctypes.c_int,  # threads
)


class RecurrentStep:
    """The call of one kernel, of the library's function ``name``, for one layer."""

    name: str

    def __init__(self, structure: ctypes.Structure) -> None:
        """``structure`` describes the layer; whoever makes it keeps the memory that it points to."""
        self._structure = structure
        self._address = ctypes.addressof(structure)

    def __call__(self, x: Tensor, past: Tensor, state: Tensor) -> Tensor:
        """``x [1, 1, hidden]``, ``past [1, channels, kernel_size]`` and ``state [1, heads, ...]`` to hidden states.

        Past and state are brought up to date. All contiguous and of one dtype, but for the state, which is in fp32.
        """
        function, isa = entry(self.name, _ARGUMENTS)
        out = torch.empty_like(x)
        addresses = (tensor.data_ptr() for tensor in (x, past, state, out))
        check(function(isa, self._address, *addresses, num_threads()))
        return out
