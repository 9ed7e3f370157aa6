"""Torch on one thread while a token is decoded: what kernels leave to it is small, and threads are waited for."""

import functools
from typing import Any

from torch import nn

from moe_offload.offload.decode.fused_forward import MAX_ROWS, FusedForward
from moe_offload.offload.pass_inputs import pass_tokens
from moe_offload.quant.threads import torch_on_its_threads, torch_on_one_thread


class StepForward(FusedForward):
    """The forward of a whole model: ``[B, S]`` tokens with at most ``MAX_ROWS`` in all leave torch one thread."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        functools.update_wrapper(self, self._eager)  # whoever asks for the forward's arguments finds them

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tokens = pass_tokens(args, kwargs)
        if tokens is None or tokens.shape[:2].numel() > MAX_ROWS:
            torch_on_its_threads()
            return self._eager(*args, **kwargs)
        with torch_on_one_thread():
            return self._eager(*args, **kwargs)
