"""A recorder made up for tests: what torch is asked to do on the CPU, written down and done again into the same memory.

It behaves as CUDA graphs do. While it records, nothing counts: memory that was there before is put back, memory that
was made meanwhile is filled with rubbish. A replay does the same operations on the same memory and runs no Python code
of the model. What would wait for the device cannot be recorded.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from moe_offload.offload.graphs.recorder import RecordingError, Replay

WAITS = ("item", "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim")
Operation = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], list[torch.Tensor]]


def tensors_in(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Tape(TorchDispatchMode):
    """One piece."""

    def __init__(self, session: "FakeRecorder") -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._session = session

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name.split("::")[1] in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        inputs = {storage_of(tensor) for tensor in tensors_in((args, kwargs))}
        if func._schema.is_mutable:
            self._session.keep(func, args, kwargs)
        result = func(*args, **kwargs)
        made = [tensor for tensor in tensors_in(result) if storage_of(tensor) not in inputs]
        if made or func._schema.is_mutable:  # what only looks at memory in another way stays true
            self.operations.append((func, args, kwargs, made))
        self._session.made.extend(made)
        return result

    def replay(self) -> None:
        for func, args, kwargs, made in self.operations:
            again = tensors_in(func(*args, **kwargs))
            if made:
                for target, source in zip(made, again, strict=True):
                    target.copy_(source)


class FakeRecorder:
    """See `Recorder`."""

    def __init__(self) -> None:
        self.num_pieces = 0
        self.made: list[torch.Tensor] = []
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._tape: _Tape | None = None

    @contextmanager
    def session(self) -> Iterator[None]:
        self.made, self._before = [], {}
        try:
            yield
        except RuntimeError as error:
            raise RecordingError(str(error)) from error
        finally:
            if self._tape is not None:
                self._tape.__exit__(None, None, None)
                self._tape = None
            for tensor in self.made:
                tensor.fill_(torch.nan if tensor.is_floating_point() else 7 if tensor.dtype != torch.bool else 1)
            for tensor, before in self._before.values():
                tensor.copy_(before)

    def begin(self) -> None:
        self._tape = _Tape(self)
        self._tape.__enter__()

    def end(self) -> Replay:
        assert self._tape is not None
        tape, self._tape = self._tape, None
        tape.__exit__(None, None, None)
        self.num_pieces += 1
        return tape.replay

    def keep(self, func: Any, args: Any, kwargs: Any) -> None:
        """Memory that was there before, about to be written to, will be put back."""
        ours = {storage_of(tensor) for tensor in self.made}
        for argument, value in zip(func._schema.arguments, [*args, *kwargs.values()], strict=False):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tensors_in(value) if is_written else ():
                self._keep(tensor, ours)
        for tensor in tensors_in(kwargs.get("out")):
            self._keep(tensor, ours)

    def _keep(self, tensor: torch.Tensor, ours: set[int]) -> None:
        storage = storage_of(tensor)
        if storage not in ours and storage not in self._before:
            whole = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
            self._before[storage] = whole, whole.clone()
