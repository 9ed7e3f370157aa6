"""Messages between two ranks: a head of integers, and tensors whose sizes it tells. One thread at a time."""

from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

HEAD_SIZE = 64
_ABORT_TAG = 99


class Link:
    """The messages from and to one other rank, each arriving in the order in which it was sent."""

    def __init__(
        self, peer: int, group: dist.ProcessGroup, device: torch.device, lost: Callable[[int, Exception], Exception]
    ) -> None:
        """``device``: where tensors travel from: gloo's are in RAM, NCCL's in VRAM. ``lost`` makes errors of errors."""
        self.peer = peer
        self.num_bytes = 0
        self._group, self._device, self._lost = group, device, lost

    def send(self, head: Sequence[int], *tensors: torch.Tensor) -> list[dist.Work]:
        """Returns at once; wait for the works when the other side has answered, or never."""
        words = torch.zeros(HEAD_SIZE, dtype=torch.int64)
        words[: len(head)] = torch.tensor(head, dtype=torch.int64)
        return [self._send(words), *(self._send(tensor.to(self._device)) for tensor in tensors if tensor.numel())]

    def receive_head(self) -> list[int]:
        """Wait for the next message, however long."""
        words: list[int] = self._receive(torch.empty(HEAD_SIZE, dtype=torch.int64)).tolist()
        return words

    def receive(self, shape: Sequence[int], dtype: torch.dtype, *, to: torch.device | None = None) -> torch.Tensor:
        """A tensor of the message whose head was received; to be called in order."""
        tensor = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        if tensor.numel():
            self._receive(tensor)
        return tensor if to is None else tensor.to(to)

    def abort(self) -> None:
        """From another thread: have every message on its way fail now, for good."""
        try:
            # gloo gives up all connections of a group when one receive has waited too long.
            work = dist.irecv(torch.empty(1), self.peer, group=self._group, tag=_ABORT_TAG)
            if work is not None:
                work.wait(timedelta(milliseconds=1))
        except RuntimeError:
            return

    def _send(self, tensor: torch.Tensor) -> dist.Work:
        data = _bytes(tensor.contiguous())
        self.num_bytes += len(data)
        try:
            work = dist.isend(data, self.peer, group=self._group)
        except RuntimeError as error:
            raise self._lost(self.peer, error) from error
        assert work is not None, "this rank is in the group"
        return work

    def _receive(self, tensor: torch.Tensor) -> torch.Tensor:
        data = _bytes(tensor)
        self.num_bytes += len(data)
        try:
            dist.recv(data, self.peer, group=self._group)
        except RuntimeError as error:
            raise self._lost(self.peer, error) from error
        return tensor


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
