"""Rank 0's side: experts of other ranks asked for, awaited, prefetched and counted."""

import json
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

import torch
import torch.distributed as dist

from moe_offload.errors import GroupError
from moe_offload.offload.experts.interrupts import InterruptShield
from moe_offload.offload.experts.peers import Call
from moe_offload.offload.parallel.group import ExpertGroup
from moe_offload.offload.parallel.link import Link
from moe_offload.offload.parallel.messages import (
    Hint,
    Kind,
    Request,
    receive_reply,
    send_hint,
    send_plain,
    send_request,
)
from moe_offload.offload.reports import RunReport


class _Asked:
    """What one rank was asked, its answer once it was received, and sends that are done when it answers."""

    def __init__(self, works: list[dist.Work]) -> None:
        self.works = works
        self.answer: torch.Tensor | str | bytes | None = None


class _Peer:
    """One other rank. Answers come in the order of what was asked, also those that nobody waits for any more."""

    def __init__(self, link: Link, device: torch.device) -> None:
        self.link = link
        self.num_missed = 0
        self._device = device
        self._lock = threading.Lock()
        self._open: deque[_Asked] = deque()
        self._unanswered: list[dist.Work] = []  # of hints, which get no answer of their own

    def ask(self, request: Request | Kind) -> _Asked:
        with self._lock:
            asked = _Asked(self._unanswered)
            self._unanswered = []
            self._open.append(asked)
            asked.works += (
                send_plain(self.link, request) if isinstance(request, Kind) else send_request(self.link, request)
            )
        return asked

    def tell(self, hint: Hint | Kind) -> None:
        with self._lock:
            self._unanswered += send_plain(self.link, hint) if isinstance(hint, Kind) else send_hint(self.link, hint)

    def answer(self, asked: _Asked) -> torch.Tensor | bytes:
        """Wait for it; `GroupError` if the rank could not do it, `PeerLostError` if it is gone."""
        with self._lock:
            while asked.answer is None:
                oldest = self._open[0]
                oldest.answer, self.num_missed = receive_reply(self.link, self._device)
                for work in oldest.works:
                    work.wait()
                self._open.popleft()
        if isinstance(asked.answer, str):
            raise GroupError(f"rank {self.link.peer}: {asked.answer}")
        return asked.answer


class RemoteExperts:
    """`Peers` of the process that runs the model; of one model, until it is closed."""

    def __init__(self, group: ExpertGroup, device: torch.device) -> None:
        """``device``: where outputs are wanted."""
        self._group, self._share = group, group.share
        self._peers = {rank: _Peer(link, device) for rank, link in group.links.items()}
        self._sent_before = sum(link.num_bytes for link in group.links.values())
        self._wait_s = 0.0
        self._is_closed = False
        self._reports = [RunReport() for _ in self._peers]

    def is_here(self, expert_idx: int) -> bool:
        """Whether rank 0 holds it."""
        return self._share.has(expert_idx)

    def ask(
        self, layer_idx: int, call: Call, x: torch.Tensor, rows_of: Mapping[int, torch.Tensor], *, prefill: bool
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """See `Peers`: each rank that holds some of them is sent one request."""
        self._group.check()
        asked = []
        with InterruptShield():
            for rank, rows in self._by_rank(rows_of).items():
                peer = self._peers[rank]
                asked.append((peer, peer.ask(Request(layer_idx, call, prefill, rows, x)), rows))
        return self._answers(asked)

    def prefetch(self, layer_idx: int, expert_ids: Sequence[int]) -> None:
        """See `Peers`."""
        with InterruptShield():
            for rank, experts in self._by_rank(dict.fromkeys(expert_ids)).items():
                self._peers[rank].tell(Hint(layer_idx, list(experts)))

    def new_sequence(self) -> None:
        """Another text begins."""
        with InterruptShield():
            for peer in self._peers.values():
                peer.tell(Kind.NEW_SEQUENCE)

    # -- figures --

    @property
    def num_missed(self) -> int:
        """Experts that decode steps asked other ranks for, and that were in no slot there."""
        return sum(peer.num_missed for peer in self._peers.values())

    @property
    def wait_s(self) -> float:
        """Time in which rank 0 waited for answers, having computed its own experts."""
        return self._wait_s

    @property
    def num_bytes(self) -> int:
        """Bytes sent and received."""
        return sum(peer.link.num_bytes for peer in self._peers.values()) - self._sent_before

    def reports(self) -> list[RunReport]:
        """What each of the other ranks has counted since the model was loaded, or had when it was lost."""
        with InterruptShield(), suppress(GroupError):
            asked = [(peer, peer.ask(Kind.COUNTS)) for peer in self._peers.values()]
            answers = [peer.answer(one) for peer, one in asked]
            self._reports = [RunReport(**json.loads(answer)) for answer in answers if isinstance(answer, bytes)]
        return self._reports

    # -- the end --

    def close(self) -> None:
        """Let the other ranks close the model too. May be called twice."""
        if not self._is_closed:
            self._is_closed = True
            with InterruptShield(), suppress(GroupError):
                ends = [(peer, peer.ask(Kind.END)) for peer in self._peers.values()]
                for peer, end in ends:
                    peer.answer(end)

    def _by_rank(self, rows_of: Mapping[int, torch.Tensor | None]) -> dict[int, dict[int, torch.Tensor]]:
        by_rank: dict[int, dict[int, torch.Tensor]] = {}
        for expert_idx, rows in rows_of.items():
            by_rank.setdefault(self._share.rank_of(expert_idx), {})[expert_idx] = rows  # type: ignore[assignment]
        return by_rank

    def _answers(
        self, asked: Sequence[tuple[_Peer, _Asked, Mapping[int, torch.Tensor]]]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        for peer, one, rows_of in asked:
            begin_s = time.perf_counter()
            with InterruptShield():
                outputs = peer.answer(one)
            self._wait_s += time.perf_counter() - begin_s
            assert isinstance(outputs, torch.Tensor)
            yield from zip(rows_of, torch.split(outputs, [len(rows) for rows in rows_of.values()]), strict=True)
