"""The C++ library of the cache: policies and replay, found beside this file if it was built, called through ctypes."""

import ctypes
from functools import cache
from pathlib import Path

from moe_offload.libraries import load_library


class Events(ctypes.Structure):
    """As in events.h; valid while the arrays behind it are."""

    _fields_ = (
        ("kind", ctypes.c_void_p),
        ("is_prefill", ctypes.c_void_p),
        ("layer_idx", ctypes.c_void_p),
        ("begin", ctypes.c_void_p),
        ("expert_ids", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("token_ids", ctypes.c_void_p),
        ("num_experts", ctypes.c_void_p),
        ("num_events", ctypes.c_int64),
        ("num_layers", ctypes.c_int32),
    )


class LearnedWeights(ctypes.Structure):
    """As in learned.h; read only while a policy is made of it."""

    _fields_ = (
        ("width", ctypes.c_int32),
        ("start", ctypes.c_void_p),
        ("now", ctypes.c_void_p),
        ("before", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


_POINTER, _INT32 = ctypes.c_void_p, ctypes.c_int32
_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "moe_cache_policy_name": (ctypes.c_char_p, (ctypes.c_int,)),
    "moe_cache_policy_new": (_POINTER, (ctypes.c_char_p, _INT32, _POINTER)),
    "moe_cache_learned_new": (_POINTER, (_INT32, _POINTER, _POINTER)),
    "moe_cache_policy_free": (None, (_POINTER,)),
    "moe_cache_policy_touch": (None, (_POINTER, _INT32, _POINTER, _INT32, _POINTER, _INT32)),
    "moe_cache_policy_scores": (_POINTER, (_POINTER, _INT32)),
    "moe_cache_policy_new_sequence": (None, (_POINTER,)),
    "moe_cache_round_to_half": (None, (_POINTER, ctypes.c_int64)),
    "moe_cache_replay_layers": (ctypes.c_int, (_POINTER, ctypes.c_char_p, _POINTER, _POINTER, _POINTER)),
    "moe_cache_replay_pool": (
        ctypes.c_int,
        (_POINTER, ctypes.c_char_p, ctypes.c_int64, _POINTER, _POINTER, _POINTER),
    ),
    "moe_cache_stack_distances": (ctypes.c_int, (_POINTER, _INT32, _POINTER)),
    "moe_cache_time_events": (
        None,
        (*[_POINTER] * 5, ctypes.c_double, ctypes.c_double, ctypes.c_uint64, *[_POINTER] * 3),
    ),
}


def _loaded(kind: type[ctypes.CDLL]) -> ctypes.CDLL | None:
    loaded = load_library(Path(__file__).parent, kind)
    if loaded is not None:
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
    return loaded


@cache
def library() -> ctypes.CDLL | None:
    """For long calls, which release the GIL; None if it was not built."""
    return _loaded(ctypes.CDLL)


@cache
def quick_library() -> ctypes.CDLL | None:
    """For calls of less than a microsecond, for which giving the GIL away and taking it back would cost more."""
    return _loaded(ctypes.PyDLL)


@cache
def policy_names() -> tuple[str, ...]:
    """Every policy that the library has; none if it was not built."""
    loaded = quick_library()
    names: list[str] = []
    while loaded is not None and (name := loaded.moe_cache_policy_name(len(names))) is not None:
        names.append(name.decode())
    return tuple(names)
