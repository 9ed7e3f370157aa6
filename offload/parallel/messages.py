"""What ranks say to each other, as heads and tensors of a `Link`.

A request is computed by the rank that holds the experts; each request gets one reply, in order. Prefetches get none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.distributed as dist

from moe_offload.offload.experts.peers import Call
from moe_offload.offload.parallel.link import HEAD_SIZE, Link

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FIELDS = 10
_INLINE = HEAD_SIZE - _FIELDS


class Kind(IntEnum):
    """What a message from rank 0 wants."""

    COMPUTE = 1
    PREFETCH = 2
    NEW_SEQUENCE = 3
    COUNTS = 4
    END = 5


@dataclass(frozen=True)
class Request:
    """Experts of a layer on rows of ``x [R, H]``."""

    layer_idx: int
    call: Call
    prefill: bool
    rows_of: Mapping[int, torch.Tensor]
    x: torch.Tensor


@dataclass(frozen=True)
class Hint:
    """Experts that a layer will probably ask for, likeliest first."""

    layer_idx: int
    expert_ids: Sequence[int]


def send_request(link: Link, request: Request) -> list[dist.Work]:
    """With only those rows of x that its experts need."""
    rows = torch.cat(list(request.rows_of.values()))
    x = request.x
    if len(x) > 1:
        used, rows = torch.unique(rows, return_inverse=True)
        if len(used) < len(x):
            x = x[used]
    index = [*request.rows_of, *map(len, request.rows_of.values()), *rows.tolist()]
    head = [Kind.COMPUTE, request.layer_idx, request.call, request.prefill, len(request.rows_of), len(index)]
    head += [*x.shape, _DTYPES.index(x.dtype)]
    return _send(link, head, index, x)


def send_hint(link: Link, hint: Hint) -> list[dist.Work]:
    """Nobody waits for what comes of it."""
    return _send(link, [Kind.PREFETCH, hint.layer_idx, 0, 0, 0, len(hint.expert_ids)], list(hint.expert_ids))


def send_plain(link: Link, kind: Kind) -> list[dist.Work]:
    """A message without contents."""
    return link.send([kind])


def receive(link: Link, device: torch.device) -> tuple[Kind, Request | Hint | None]:
    """The next message from rank 0."""
    head = link.receive_head()
    kind = Kind(head[0])
    if kind not in (Kind.COMPUTE, Kind.PREFETCH):
        return kind, None
    _, layer_idx, call, prefill, num_experts, num_index, num_rows, width, dtype = head[: _FIELDS - 1]
    index = torch.tensor(head[_FIELDS : _FIELDS + num_index])
    if num_index > _INLINE:
        index = link.receive((num_index,), torch.int64, to=torch.device("cpu"))
    if kind is Kind.PREFETCH:
        return kind, Hint(layer_idx, index.tolist())
    experts, counts = index[:num_experts].tolist(), index[num_experts : 2 * num_experts].tolist()
    rows = torch.split(index[2 * num_experts :].to(device), counts)
    x = link.receive((num_rows, width), _DTYPES[dtype], to=device)
    return kind, Request(layer_idx, Call(call), bool(prefill), dict(zip(experts, rows, strict=True)), x)


def send_reply(link: Link, result: torch.Tensor | str | bytes, num_missed: int = 0) -> None:
    """Rows of outputs; bytes; or, as text, what went wrong. ``num_missed``: experts asked for in vain so far."""
    if isinstance(result, torch.Tensor):
        works = link.send([0, num_missed, *result.shape, _DTYPES.index(result.dtype)], result)
    else:
        text = result.encode() if isinstance(result, str) else result
        data = torch.tensor(list(text), dtype=torch.uint8)
        works = link.send([1 if isinstance(result, str) else 2, num_missed, len(data)], data)
    for work in works:
        work.wait()


def receive_reply(link: Link, device: torch.device) -> tuple[torch.Tensor | str | bytes, int]:
    """What `send_reply` sent."""
    status, num_missed, num_rows, width, dtype = link.receive_head()[:5]
    if status == 0:
        return link.receive((num_rows, width), _DTYPES[dtype], to=device), num_missed
    data = bytes(link.receive((num_rows,), torch.uint8, to=torch.device("cpu")).tolist())
    return data.decode() if status == 1 else data, num_missed


def _send(link: Link, head: list[int], index: list[int], *tensors: torch.Tensor) -> list[dist.Work]:
    head += [0] * (_FIELDS - len(head))
    if len(index) <= _INLINE:
        return link.send([*head, *index], *tensors)
    return link.send(head, torch.tensor(index), *tensors)
