"""How long a replayed run would have taken, given the rates of a machine."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_offload.cache import kernels
from moe_offload.cache.counts import PrefetchCounts
from moe_offload.cache.replay_arrays import ReplayEvents
from moe_offload.cache.trace import EventKind, RoutingTrace
from moe_offload.errors import ConfigError


@dataclass(frozen=True)
class Rates:
    """What a machine needs for a decode step. Of prompts only the transfers are timed."""

    link_bytes_per_s: float  # the slowest part of the way from where experts are kept to where they are computed
    before_s: float | tuple[float, ...] = 0.0  # of a layer, until its router has chosen; or one number for each layer
    experts_s: float | tuple[float, ...] = 0.0  # of a layer's experts, all resident
    other_s: float = 0.0  # of a step, outside of its layers

    def __post_init__(self) -> None:
        if not self.link_bytes_per_s > 0:
            raise ConfigError(f"a link of {self.link_bytes_per_s} bytes a second brings nothing; give its rate")


@dataclass(frozen=True)
class Lookahead:
    """What prefetching foresees one layer ahead, and how much of what it brings is asked for."""

    recall: float = 0.0
    precision: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.recall <= 1 or not 0 < self.precision <= 1:
            raise ConfigError(
                f"recall {self.recall} must lie in 0..1, and precision {self.precision} above 0 and up to 1"
            )


@dataclass(frozen=True, eq=False)
class SimulatedTime:
    """Seconds of a replayed run, and what its prefetching brought: counts of experts, by layer."""

    decode_s: float
    prefill_s: float
    decode_wait_s: float  # part of decode_s in which a step computed nothing because an expert was awaited
    layer_wait_s: tuple[float, ...]  # of decode steps
    prefetch: tuple[PrefetchCounts, ...]


def measured_rates(trace: RoutingTrace, link_bytes_per_s: float) -> Rates:
    """The layers' own times as the trace has them, averages of its decode steps; none where it has no times."""
    if trace.layer_us is None or trace.step is None or trace.step_us is None:
        return Rates(link_bytes_per_s)
    is_decode = np.ones(trace.num_tokens, np.bool_) if trace.phase is None else trace.phase == 1
    steps = np.unique(trace.step[is_decode])
    if not len(steps):
        return Rates(link_bytes_per_s)
    # Averages and not medians: what a run's steps took in all is what its replay is to be compared with.
    dense_us, router_us, _, experts_us = trace.layer_us[steps].mean(axis=0).T  # [layers] each
    inside_us = trace.layer_us[steps].sum((1, 2), dtype=np.int64)
    other_us = np.maximum(0, trace.step_us[steps].astype(np.int64) - inside_us).mean()
    return Rates(
        link_bytes_per_s,
        tuple(((dense_us + router_us) / 1e6).tolist()),
        tuple((experts_us / 1e6).tolist()),
        float(other_us) / 1e6,
    )


def simulate_time(
    events: ReplayEvents,
    fetched: npt.NDArray[np.uint16],
    expert_bytes: Sequence[int] | None,
    rates: Rates,
    lookahead: Lookahead,
    seed: int = 0,
) -> SimulatedTime:
    """See timing.h for the model of a step. ConfigError where it is not known how large experts are."""
    library = kernels.library()
    if library is None:
        raise ConfigError(
            "simulated seconds need the compiled library of the cache, which was not built; "
            "install a C++ compiler and install moe-offload again, or leave the rates out"
        )
    if expert_bytes is None:
        raise ConfigError("the trace does not tell how large its experts are; give their size in bytes with the rates")
    transfer_s = np.array(expert_bytes, np.float64) / rates.link_bytes_per_s
    is_decode = (events.is_prefill == 0) & (events.kind != EventKind.NEW_SEQUENCE)
    before_s = np.where(is_decode, _by_layer(rates.before_s, events)[events.layer_idx], 0.0)
    before_s[is_decode & _begins_step(events)] += rates.other_s
    experts_s = np.where(is_decode, _by_layer(rates.experts_s, events)[events.layer_idx], 0.0)
    event_s, wait_s = np.zeros(events.num_events), np.zeros(events.num_events)
    counts = np.zeros((events.num_layers, 4), np.int64)
    library.moe_cache_time_events(
        ctypes.byref(events.native()),
        fetched.ctypes.data,
        transfer_s.ctypes.data,
        before_s.ctypes.data,
        experts_s.ctypes.data,
        lookahead.recall,
        lookahead.precision,
        seed,
        event_s.ctypes.data,
        wait_s.ctypes.data,
        counts.ctypes.data,
    )
    layer_wait_s = np.bincount(events.layer_idx[is_decode], wait_s[is_decode], events.num_layers)
    return SimulatedTime(
        float(event_s[is_decode].sum()),
        float(event_s[~is_decode].sum()),
        float(layer_wait_s.sum()),
        tuple(layer_wait_s.tolist()),
        tuple(PrefetchCounts(*row) for row in counts.tolist()),
    )


def _by_layer(seconds: float | tuple[float, ...], events: ReplayEvents) -> npt.NDArray[np.float64]:
    given = np.array(seconds, np.float64).reshape(-1)
    if given.size not in (1, events.num_layers):
        raise ConfigError(f"{given.size} times for {events.num_layers} layers; give one for all, or one for each")
    return np.broadcast_to(given, events.num_layers)


def _begins_step(events: ReplayEvents) -> npt.NDArray[np.bool_]:
    """A layer that does not come after the one before begins another forward pass."""
    before = np.concatenate([[np.iinfo(np.int32).max], events.layer_idx[:-1]])
    new_text = np.concatenate([[True], events.kind[:-1] == EventKind.NEW_SEQUENCE])
    begins: npt.NDArray[np.bool_] = (events.layer_idx <= before) | new_text
    return begins
