"""Where experts were over the run, reconstructed from what each request found."""

from itertools import pairwise

import numpy as np

from moe_offload.cache.trace import Array, Outcome, RoutingTrace
from moe_offload.offload.profiling.requests import Requests, Steps, num_experts
from moe_offload.offload.profiling.sections import Residency

_FRAMES, _LARGEST_DIGITS = 24, 400_000
_SAMPLES_PER_FRAME = 9


def residency_frames(trace: RoutingTrace, steps: Steps, requests: Requests) -> Residency | None:
    """The decode steps cut into frames, each looked at nine times; None if outcomes or slots are not known.

    An expert whose next request finds it resident has been in its slot since the last one. The other slots hold what
    nobody knows, for it was not asked for again before it went: they are given to those used last.
    """
    decode_steps = np.flatnonzero(steps.is_decode)
    if requests.outcome is None or trace.num_slots is None or not len(decode_steps):
        return None
    sizes = num_experts(trace)
    num_frames = max(1, min(_FRAMES, len(decode_steps), _LARGEST_DIGITS // max(1, sum(sizes))))
    edges = np.linspace(0, len(decode_steps), num_frames + 1).astype(int)
    moments = np.concatenate(
        [np.linspace(begin, end - 1, _SAMPLES_PER_FRAME).astype(int) for begin, end in pairwise(edges)]
    )
    digits = np.zeros((num_frames, trace.num_layers, max(sizes)), np.uint8)
    for layer, (size, num_slots) in enumerate(zip(sizes, trace.num_slots.tolist(), strict=True)):
        inside = requests.only(requests.layer == layer)
        present = _present(inside, decode_steps[moments], size, num_slots)  # [samples, experts]
        digits[:, layer, :size] = present.reshape(num_frames, _SAMPLES_PER_FRAME, size).sum(axis=1)
    tokens_before = np.cumsum(steps.num_tokens[decode_steps]) - steps.num_tokens[decode_steps]
    frames = tuple(
        tuple("".join(map(str, frame[layer, :size].tolist())) for layer, size in enumerate(sizes)) for frame in digits
    )
    return Residency(tuple(tokens_before[edges[:-1]].tolist()), frames)


def _present(requests: Requests, moments: Array, size: int, num_slots: int) -> Array:
    """Whether each expert of a layer was in a slot just after these steps: ``[moments, experts]``."""
    assert requests.outcome is not None
    last_use = np.full((len(moments), size), -1, np.int64)
    is_kept = np.zeros((len(moments), size), bool)
    bounds = np.searchsorted(requests.expert, np.arange(size + 1))
    for expert in range(size):
        begin, end = bounds[expert], bounds[expert + 1]
        if begin == end:
            continue
        used, outcome = requests.step[begin:end], requests.outcome[begin:end]
        following = np.searchsorted(used, moments, side="right")
        last_use[:, expert] = np.where(following > 0, used[following - 1], -1)
        is_kept[:, expert] = np.append(outcome == Outcome.RESIDENT, False)[following]
    # Those known to be there first, then the latest used; never more than there are slots.
    rank = np.where(is_kept, np.iinfo(np.int64).max, last_use)
    order = np.argsort(-rank, axis=1, kind="stable")
    present = np.zeros_like(is_kept)
    np.put_along_axis(present, order[:, :num_slots], True, axis=1)
    return present & (is_kept | (last_use >= 0))
