"""The checksum of an expert, taken while its chunks land, so that little is left to do after the last."""

import threading

import xxhash


class RunningChecksum:
    """XXH3-64 of bytes that come in chunks, in any order, from several threads."""

    def __init__(self) -> None:
        """Of nothing yet."""
        self._state = xxhash.xxh3_64()
        self._lock = threading.Lock()
        self._landed: dict[int, int] = {}  # begin -> end of what was not taken yet
        self._end = 0  # of what was taken
        self._is_busy = False

    def landed(self, memory: memoryview, chunk: range) -> None:
        """A chunk of ``memory`` is there: take it and what follows, as far as that is there and nobody else does.

        When every call for some chunks has returned, all of them are taken.
        """
        with self._lock:
            self._landed[chunk.start] = chunk.stop
            if self._is_busy:
                return
            self._is_busy = True
        while (span := self._next()) is not None:
            self._state.update(memory[span.start : span.stop])  # lets other threads run meanwhile

    def _next(self) -> range | None:
        with self._lock:
            end = self._landed.pop(self._end, None)
            if end is None:
                self._is_busy = False
                return None
            span = range(self._end, end)
            self._end = end
            return span

    def hexdigest(self) -> str:
        """Of all chunks, as 16 lower-case hex digits; they have landed without gaps."""
        return self._state.hexdigest()
