"""Torch on one thread while a token is decoded: what kernels leave to it is small, and threads are waited for."""

import functools
import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from moe_offload.offload.decode.fused_forward import MAX_ROWS, FusedForward
from moe_offload.offload.pass_inputs import pass_tokens
from moe_offload.quant.threads import torch_on_all_threads, torch_on_one_thread

_models: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()  # those with a `StepForward`, whatever stands before it


class StepForward(FusedForward):
    """The forward of a whole model: ``[B, S]`` tokens with at most ``MAX_ROWS`` in all leave torch one thread."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        _models.add(model)
        functools.update_wrapper(self, self._eager)  # whoever asks for the forward's arguments finds them

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tokens = pass_tokens(args, kwargs)
        if tokens is None or tokens.shape[:2].numel() > MAX_ROWS:
            with torch_on_all_threads():
                return self._eager(*args, **kwargs)
        with torch_on_one_thread():
            return self._eager(*args, **kwargs)


def between_steps_too(model: Any) -> AbstractContextManager[None]:
    """While an answer is written, torch is on one thread between its steps as well; prompts have them all.

    A thread that torch woke for a step's logits spins for milliseconds, beside the first layers of the next step.
    """
    has_steps = model in _models and not model.config.is_encoder_decoder  # nobody would give an encoder its threads
    return torch_on_one_thread() if has_steps else nullcontext()
