"""Reads from the disk, and what became of the speculative ones."""

import threading
import time
from dataclasses import dataclass

from moe_offload.cache import TransferKind
from moe_offload.offload.streaming.read_queue import Read
from moe_offload.offload.streaming.reader import ReadCancelledError

Key = tuple[int, int]  # layer_idx, expert_idx


@dataclass
class TransferNote:
    """One read, from its first chunk until its bytes were verified; times of ``perf_counter_ns``."""

    key: Key
    begin_ns: int
    end_ns: int
    num_bytes: int
    kind: TransferKind


class TransferLog:
    """Is told of every read (`ReadObserver`), and of what the steps found prefetched; from any thread.

    A speculative read is noted once it is known whether somebody asked for its expert.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done: list[TransferNote] = []
        self._open: dict[Key, TransferNote] = {}  # speculative ones that nobody has asked for yet
        self._wanted: set[Key] = set()  # speculative ones that somebody has asked for before they were there
        self._warming: set[Key] = set()

    def settled(self, read: Read) -> None:
        """A read has ended; those that never began, or failed, moved nothing."""
        cancelled = isinstance(read.error, ReadCancelledError)
        if not read.begin_ns or (read.error is not None and not cancelled):
            return
        key = (read.layer_idx, read.expert_idx)
        num_bytes = read.next_bytes if cancelled else read.size_bytes
        note = TransferNote(key, read.begin_ns, time.perf_counter_ns(), num_bytes, TransferKind.DEMAND)
        with self._lock:
            if (forgotten := self._open.pop(key, None)) is not None:
                self._settle(forgotten, TransferKind.WASTED)
            if not read.is_guess:
                self._settle(note, TransferKind.DEMAND)
            elif cancelled:
                self._settle(note, TransferKind.WASTED)
            elif key in self._warming:
                self._warming.discard(key)
                self._settle(note, TransferKind.WARM)
            elif key in self._wanted:
                self._wanted.discard(key)
                self._settle(note, TransferKind.USED)
            else:
                self._open[key] = note

    def warming(self, key: Key) -> None:
        """The next read of this expert is a warm start's."""
        with self._lock:
            self._warming.add(key)

    def used(self, key: Key, arrived: bool) -> None:
        """A step asked for an expert that was prefetched."""
        with self._lock:
            note = self._open.pop(key, None)
            if note is not None:
                self._settle(note, TransferKind.USED)
            elif not arrived:
                self._wanted.add(key)

    def _settle(self, note: TransferNote, kind: TransferKind) -> None:
        note.kind = kind
        self._done.append(note)

    def take(self, *, all_of_them: bool = False) -> list[TransferNote]:
        """Those whose fate is known since the last call; ``all_of_them``: what nobody has asked for was wasted."""
        with self._lock:
            if all_of_them:
                for note in self._open.values():
                    self._settle(note, TransferKind.WASTED)
                self._open.clear()
            done, self._done = self._done, []
            return done
