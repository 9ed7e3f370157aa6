"""A warm start: what was hot when a model was closed is read back after the next load, behind all demand."""

import json
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import xxhash

from moe_offload.offload.experts.residency import Residency
from moe_offload.offload.home import home_dir
from moe_offload.offload.pack.manifest import MANIFEST_NAME
from moe_offload.offload.pack.share import Share

HOT_SET_NAME = ".hot-set.json"
# One is read while another is verified; more would only hold up the first step's own reads.
IN_FLIGHT = 2


class HotSetFile:
    """The hot set of one pack: beside it, or under ``MOE_OFFLOAD_HOME`` where the pack cannot be written to.

    It is a hint: what cannot be read or written, or is of another pack, is as if it were not there.
    """

    def __init__(self, folder: Path, num_experts: Sequence[int], share: Share | None = None) -> None:
        """Reads nothing yet. ``share``: ranks that share out the experts of one pack have a file each."""
        self._num_experts = list(num_experts)
        self._pack_id = xxhash.xxh3_64_hexdigest((folder / MANIFEST_NAME).read_bytes())
        part = "" if share is None else f".{share.rank}-of-{share.num_ranks}"
        self._share = share
        self._paths = [
            folder / HOT_SET_NAME.replace(".json", f"{part}.json"),
            home_dir() / "hot-sets" / f"{self._pack_id}{part}.json",
        ]

    def load(self) -> list[list[int]]:
        """Each layer's experts, hottest first; none where nothing usable was saved."""
        for path in self._paths:
            with suppress(OSError, ValueError, RecursionError):
                saved = json.loads(path.read_text(encoding="utf-8"))
                if self._is_ours(saved):
                    return [list(experts) for experts in saved["experts"]]
        return [[] for _ in self._num_experts]

    def _is_ours(self, saved: object) -> bool:
        if not (isinstance(saved, dict) and saved.get("pack") == self._pack_id):
            return False
        layers = saved.get("experts")
        if not (isinstance(layers, list) and len(layers) == len(self._num_experts)):
            return False
        return all(
            isinstance(experts, list)
            and all(type(expert_idx) is int and 0 <= expert_idx < num_experts for expert_idx in experts)
            and (self._share is None or all(map(self._share.has, experts)))
            and len(set(experts)) == len(experts)
            for experts, num_experts in zip(layers, self._num_experts, strict=True)
        )

    def save(self, experts: Sequence[Sequence[int]]) -> None:
        """Replace what was saved, at once or not at all."""
        text = json.dumps({"pack": self._pack_id, "experts": [list(layer) for layer in experts]})
        for path in self._paths:
            partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                partial.write_text(text, encoding="utf-8")
                partial.replace(path)
                return
            except OSError:
                with suppress(OSError):
                    partial.unlink()


class WarmStart:
    """Reads a hot set back into empty slots, a few experts at a time; what steps ask for meanwhile goes before it."""

    def __init__(self, residency: Residency, hot_set: Sequence[Sequence[int]]) -> None:
        """``hot_set``: each layer's experts, hottest first."""
        self._residency = residency
        ranks = range(max(map(len, hot_set), default=0))
        self._left = [(i, experts[rank]) for rank in ranks for i, experts in enumerate(hot_set) if rank < len(experts)]
        self._left.reverse()
        self._lock = threading.Lock()
        for layer_idx, experts in enumerate(hot_set):
            residency.cache.remember(layer_idx, experts)
        for _ in range(IN_FLIGHT):
            self._next(None)

    def _next(self, error: BaseException | None) -> None:
        """Go on after a read; a failed one ends it, and is reported by the step that needs the expert."""
        while error is None:
            with self._lock:
                if not self._left:
                    return
                layer_idx, expert_idx = self._left.pop()
            if self._residency.warm(layer_idx, expert_idx, self._next):
                return
