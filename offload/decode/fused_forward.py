"""What the fast forwards of modules share: the module's own forward behind them, and when it has to run."""

from typing import Any

import torch
from torch import nn

# More rows than this are bound by arithmetic, for which torch has matrix units.
MAX_ROWS = 2


class FusedForward:
    """Stands in an instance's ``forward``; calls the class's where it cannot help."""

    def __init__(self, module: nn.Module) -> None:
        self._eager: Any = module.forward
        module.forward = self  # type: ignore[assignment]

    @property
    def eager(self) -> Any:
        """The module's forward as transformers wrote it."""
        return self._eager


class Memory:
    """The tensors of modules that a call's structures point into; a model that was converted has others."""

    def __init__(self, *tensors: tuple[nn.Module, str]) -> None:
        self._held = [(module, name, _address(module, name)) for module, name in tensors]

    def is_unchanged(self) -> bool:
        """Whether every tensor is where it was."""
        return all(_address(module, name) == address for module, name, address in self._held)


def _address(module: nn.Module, name: str) -> int | None:
    tensor: torch.Tensor | None = module._parameters.get(name)
    if tensor is None:
        tensor = module._buffers.get(name)
    return None if tensor is None else tensor.data_ptr()


def is_plain(tensor: Any, dtype: torch.dtype) -> bool:
    """Whether kernels can read it: a contiguous tensor in RAM, of ``dtype``, that no gradient is wanted of."""
    return (
        type(tensor) is torch.Tensor
        and tensor.dtype == dtype
        and tensor.is_cpu
        and tensor.is_contiguous()
        and not (tensor.requires_grad and torch.is_grad_enabled())
    )
