"""The ranks that share a model's experts: how they come together, agree, learn of each other's end, and part."""

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from moe_offload.errors import ConfigError, GroupError, PeerLostError
from moe_offload.offload.pack.manifest import PackManifest
from moe_offload.offload.pack.share import Share
from moe_offload.offload.parallel.agreement import Facts, check_agreement, facts_of
from moe_offload.offload.parallel.environment import Place
from moe_offload.offload.parallel.link import Link
from moe_offload.offload.parallel.network import chosen_interface
from moe_offload.offload.parallel.watch import Watch
from moe_offload.offload.planning.memory import Memory, ram_memory

if TYPE_CHECKING:
    from moe_offload.offload.parallel.remote_experts import RemoteExperts

# For all ranks to be started, on machines that may be busy.
START_TIMEOUT_S = 120
_PART_TIMEOUT_S = 10
_POLL_S = 0.05
# A rank may wait for another's disk, or for the user's next message: who is lost is the watch's to say.
_NO_TIMEOUT = timedelta(days=365)
T = TypeVar("T")


class ExpertGroup:
    """This process in its group: a context, entered by all ranks. Rank 0 runs the model, the others hold experts."""

    def __init__(self, place: Place, device: str = "auto") -> None:
        """Wait for all ranks; `GroupError` if they do not come. ``device``: where this one computes."""
        if place.num_ranks < 2:
            raise ConfigError("a group needs two ranks or more; with one, load the model without a group")
        self.place = place
        self.share = Share(place.rank, place.num_ranks)
        self._num_agreed = 0
        self._everyone: list[Facts] = []
        memory = ram_memory()  # now, before anybody has taken any
        self.ram = Memory(memory.total_bytes // place.num_local, memory.free_bytes // place.num_local)
        with chosen_interface(place.host, place.port) as interface:
            self._messages = messages = self._come_together(device, interface)
        link_device = torch.device("cuda", place.local_rank) if self._use_nccl else torch.device("cpu")
        ranks = range(1, place.num_ranks) if place.rank == 0 else [0]
        self.links = {rank: Link(rank, messages, link_device, self.lost) for rank in ranks}
        self._watch = Watch(self._connect, place.rank, place.num_ranks, place.silence_s, self._abort)

    def _come_together(self, device: str, interface: str | None) -> dist.ProcessGroup:
        place, timeout = self.place, timedelta(seconds=START_TIMEOUT_S)
        try:
            self._store, _, _ = next(rendezvous("env://", timeout=timeout))
            self._use_nccl = self._all_on_gpus(device)
            if self._use_nccl:
                # What a thread does on "the current device", as page-locking does, is done on this rank's.
                torch.cuda.set_device(place.local_rank)
                # Who is lost is the watch's to say: NCCL's own would end the process without a word.
                os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if self._use_nccl else "gloo",
                store=self._store,
                rank=place.rank,
                world_size=place.num_ranks,
                timeout=timeout,
            )
            messages: dist.ProcessGroup | None = dist.new_group(timeout=_NO_TIMEOUT)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise GroupError(
                f"the {place.num_ranks} ranks did not come together at {place.host}:{place.port} within "
                f"{START_TIMEOUT_S} s ({reason:.200}); see that all are started, that port {place.port} is open, and "
                f"that the network interface {interface} leads to the other machines (GLOO_SOCKET_IFNAME)"
            ) from error
        assert messages is not None
        return messages

    @classmethod
    def from_environment(cls, device: str = "auto") -> Self:
        """The group that torchrun has started this process in."""
        return cls(Place.from_environment(), device)

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def note(self) -> str:
        """Who they are, and what that means for the answers, in words; known when they have agreed on a model."""
        machines = "on this machine" if self.place.is_one_machine else "on several machines"
        kernels = sorted({str(facts["kernels"]) for facts in self._everyone})
        exact = "" if len(kernels) < 2 else f"; their kernels differ ({', '.join(kernels)}): exact to rounding"
        return f"{self.place.num_ranks} {machines}, this is rank 0{exact}"

    # -- what happens on all ranks --

    def agree(self, manifest: PackManifest) -> None:
        """Wait until all ranks are about to load this model; `GroupMismatchError` on every one if they are not."""
        self._num_agreed += 1
        facts = facts_of(manifest)
        key = f"facts/{self._num_agreed}"
        self._set(f"{key}/{self.rank}", json.dumps(facts))
        self._everyone = [json.loads(self._get(f"{key}/{rank}")) for rank in range(self.place.num_ranks)]
        try:
            check_agreement(self._everyone)
        except GroupError as error:
            self._watch.error = error  # nobody waits for the others any more
            raise

    def open_peers(self, device: torch.device) -> "RemoteExperts":
        """On rank 0: the other ranks' experts, of the model that was agreed on; outputs are wanted on ``device``."""
        from moe_offload.offload.parallel.remote_experts import RemoteExperts

        return RemoteExperts(self, device)

    def in_turn(self, make: Callable[[], T], what: str) -> T:
        """``make()`` on one rank of each machine, then on its others, which find what it has made."""
        if self.place.local_rank == 0:
            made = make()
        machine = os.environ.get("GROUP_RANK", str(self.rank - self.place.local_rank))
        key = f"made/{machine}/{what}"
        if self.place.local_rank == 0:
            self._set(key, "yes")
            return made
        self._get(key)
        return make()

    def check(self) -> None:
        """Raise if a rank is known to be lost."""
        self._watch.check()

    def lost(self, rank: int, error: Exception) -> GroupError:
        """What a connection's error means: the watch may know better, and learns a reason within moments."""
        give_up_s = time.monotonic() + 1.0
        while self._watch.error is None and time.monotonic() < give_up_s:
            time.sleep(0.02)
        if self._watch.error is None:
            reason = str(error).partition("\n")[0].rpartition("] ")[2]
            self._watch.error = PeerLostError(
                f"rank {rank} is gone: its process has ended, or was killed, perhaps for want of memory; its own "
                f"messages say more; start all ranks again ({reason:.100})"
            )
        return self._watch.error

    # -- the end --

    def close(self, error: BaseException | None = None) -> None:
        """Part from the others; with an ``error``, tell them of it."""
        try:
            if error is not None and not isinstance(error, PeerLostError) and self._watch.error is None:
                with suppress(RuntimeError):
                    self._store.set(f"failed/{self.rank}", str(error) or type(error).__name__)
            elif error is None and self._watch.error is None:
                self._part()
        finally:
            self._watch.stop()
            dist.destroy_process_group()

    def _part(self) -> None:
        """Rank 0 may have the store in it, so it is the last to leave."""
        self._watch.stop()
        with suppress(RuntimeError):
            self._store.set(f"left/{self.rank}", "yes")
            if self.rank == 0:
                left = [f"left/{rank}" for rank in range(self.place.num_ranks)]
                self._store.wait(left, timedelta(seconds=_PART_TIMEOUT_S))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(error)

    # -- the store --

    def _all_on_gpus(self, device: str) -> bool:
        """Whether messages can go from VRAM to VRAM."""
        mine = device != "cpu" and torch.cuda.device_count() > self.place.local_rank and dist.is_nccl_available()
        self._store.set(f"cuda/{self.rank}", str(int(mine)))
        return all(self._store.get(f"cuda/{rank}") == b"1" for rank in range(self.place.num_ranks))

    def _connect(self) -> Any:
        return dist.TCPStore(  # type: ignore[attr-defined]
            self.place.host, self.place.port, is_master=False, timeout=timedelta(seconds=self.place.silence_s)
        )

    def _set(self, key: str, value: str) -> None:
        try:
            self._store.set(key, value)
        except RuntimeError as error:
            raise self.lost(0, error) from error

    def _get(self, key: str) -> Any:
        """A value that another rank sets, sooner or later."""
        while True:
            self.check()
            try:
                if self._store.check([key]):
                    return self._store.get(key)
            except RuntimeError as error:
                raise self.lost(0, error) from error
            time.sleep(_POLL_S)

    def _abort(self) -> None:
        for link in self.links.values():
            link.abort()
        if self._use_nccl:  # a tensor on its way from a rank that is gone would keep the device waiting for good
            with suppress(RuntimeError):
                self._messages._get_backend(torch.device("cuda")).abort()
