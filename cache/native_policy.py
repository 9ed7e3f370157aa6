"""A policy of the C++ library behind the `Policy` protocol: the one that replay runs, in a running cache."""

import ctypes
import weakref
from collections.abc import Sequence

from moe_offload.cache import kernels
from moe_offload.errors import ConfigError


class NativePolicy:
    """See `Policy`; ConfigError if the library was not built or does not have the policy."""

    def __init__(self, name: str, num_experts: Sequence[int]) -> None:
        library = kernels.quick_library()
        if library is None or name not in kernels.policy_names():
            raise ConfigError(
                f"the policy {name!r} needs the compiled library of the cache, which has: "
                f"{', '.join(kernels.policy_names()) or 'nothing, as it was not built'}; "
                "install a C++ compiler and install moe-offload again"
            )
        sizes = (ctypes.c_int32 * len(num_experts))(*num_experts)
        handle = library.moe_cache_policy_new(name.encode(), len(num_experts), sizes)
        if not handle:
            raise MemoryError(f"no memory for the policy {name!r}")
        self._adopt(library, handle, num_experts)

    def _adopt(self, library: ctypes.CDLL, handle: int, num_experts: Sequence[int]) -> None:
        self._library, self._handle = library, handle
        self._free = weakref.finalize(self, library.moe_cache_policy_free, handle)
        self._free.atexit = False
        self._scores = [
            (ctypes.c_double * n).from_address(library.moe_cache_policy_scores(handle, layer_idx))
            for layer_idx, n in enumerate(num_experts)
        ]

    def touch(
        self, layer_idx: int, expert_ids: Sequence[int], weights: Sequence[float] | None, token_id: int = -1
    ) -> None:
        num = len(expert_ids)
        self._library.moe_cache_policy_touch(
            self._handle,
            layer_idx,
            (ctypes.c_int32 * num)(*expert_ids),
            num,
            None if weights is None else (ctypes.c_double * num)(*weights),
            token_id,
        )

    def scores(self, layer_idx: int) -> Sequence[float]:
        self._library.moe_cache_policy_scores(self._handle, layer_idx)
        return self._scores[layer_idx]  # type: ignore[return-value]  # an array of doubles is as good as a sequence

    def new_sequence(self) -> None:
        self._library.moe_cache_policy_new_sequence(self._handle)
