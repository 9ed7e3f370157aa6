"""How well the next experts were foreseen, and what reading them ahead brought."""

from typing import Any

import numpy as np

from moe_offload.cache.trace import Array, Outcome, RoutingTrace, TransferKind
from moe_offload.offload.profiling.intervals import union_us
from moe_offload.offload.profiling.requests import DECODE, Requests, Steps, phases
from moe_offload.offload.profiling.sections import OptionalFloats, Prediction


def prediction(trace: RoutingTrace, steps: Steps, requests: Requests) -> Prediction | None:
    """Recall, precision, bytes and time; None for a trace without predictions."""
    if trace.predicted is None or trace.distance is None or not (trace.predicted >= 0).any():
        return None
    decoded = phases(trace) == DECODE
    counts = np.array(
        [_counts(trace.experts[decoded, layer], trace.predicted[decoded, layer]) for layer in range(trace.num_layers)]
    )  # [layers, right / asked / predicted, distances]
    total = counts.sum(axis=0)
    return Prediction(
        distances=tuple(trace.distance.tolist()),
        predicted_per_layer=int((trace.predicted >= 0).sum(axis=-1).max()),
        recall=_ratios(total[0], total[1]),
        precision=_ratios(total[0], total[2]),
        layer_recall=tuple(_ratios(right, asked) for right, asked, _ in counts),
        layer_precision=tuple(_ratios(right, named) for right, _, named in counts),
        **_experts_and_bytes(trace, steps, requests),
        **_times(trace, steps, requests),
    )


def _counts(experts: Array, predicted: Array) -> Array:
    """Right, asked for and predicted ``[3, distances]``, of tokens for which something was predicted.

    ``experts`` [tokens, k], ``predicted`` [tokens, distances, m].
    """
    was_predicted = (predicted >= 0).any(axis=2)  # [tokens, distances]
    right = ((predicted[:, :, :, None] == experts[:, None, None, :]) & (predicted[:, :, :, None] >= 0)).any(axis=3)
    asked = np.where(was_predicted, (experts >= 0).sum(axis=1)[:, None], 0)
    return np.stack([right.sum(axis=(0, 2)), asked.sum(axis=0), (predicted >= 0).sum(axis=(0, 2))])


def _ratios(part: Array, whole: Array) -> OptionalFloats:
    return tuple(p / w if w else None for p, w in zip(part.tolist(), whole.tolist(), strict=True))


def _experts_and_bytes(trace: RoutingTrace, steps: Steps, requests: Requests) -> dict[str, Any]:
    names = [f"{fate}_{what}" for fate in ("used", "late", "wasted") for what in ("experts", "bytes")]
    if trace.transfer_kind is None or trace.transfer_bytes is None or trace.transfer_begin_us is None:
        return dict.fromkeys([*names, "demand_bytes"])
    inside = in_decode(trace, steps)

    def sums(kind: TransferKind) -> tuple[int, int]:
        chosen = inside & (trace.transfer_kind == kind)
        assert trace.transfer_bytes is not None
        return int(chosen.sum()), int(trace.transfer_bytes[chosen].sum(dtype=np.int64))

    asked = requests.only(requests.is_decode)
    late_experts = late_bytes = 0
    if asked.outcome is not None and trace.expert_bytes is not None:
        layers = asked.layer[asked.outcome == Outcome.LATE]
        late_experts, late_bytes = len(layers), int(trace.expert_bytes[layers].sum())
    used_experts, used_bytes = sums(TransferKind.USED)
    wasted_experts, wasted_bytes = sums(TransferKind.WASTED)
    return {
        "used_experts": max(0, used_experts - late_experts),
        "used_bytes": max(0, used_bytes - late_bytes),
        "late_experts": late_experts,
        "late_bytes": late_bytes,
        "wasted_experts": wasted_experts,
        "wasted_bytes": wasted_bytes,
        "demand_bytes": sums(TransferKind.DEMAND)[1],
    }


def _times(trace: RoutingTrace, steps: Steps, requests: Requests) -> dict[str, Any]:
    """What was waited for, and the time in which the disk read ahead while nothing waited for that."""
    if trace.layer_us is None or trace.transfer_kind is None:
        return {"hidden_s": None, "waited_s": None}
    assert trace.transfer_begin_us is not None
    assert trace.transfer_end_us is not None
    wait_us = trace.layer_us[..., 2].astype(np.int64) * steps.is_decode[:, None]  # [S, layers]
    used = in_decode(trace, steps) & (trace.transfer_kind == TransferKind.USED)
    busy_us = union_us(trace.transfer_begin_us[used], trace.transfer_end_us[used])
    late_us = 0
    if requests.outcome is not None:
        # A wait is for the late ones where a layer misses nothing else.
        kinds = np.zeros((2, *wait_us.shape), bool)
        for index, outcome in enumerate((Outcome.LATE, Outcome.MISSED)):
            chosen = requests.outcome == outcome
            kinds[index, requests.step[chosen], requests.layer[chosen]] = True
        late_us = int(wait_us[kinds[0] & ~kinds[1]].sum())
    return {"hidden_s": max(0, busy_us - late_us) / 1e6, "waited_s": float(wait_us.sum()) / 1e6}


def in_decode(trace: RoutingTrace, steps: Steps) -> Array:
    """Which transfers began during decode steps ``[transfers]``."""
    assert trace.transfer_begin_us is not None
    if trace.step_begin_us is None or not len(steps):
        return np.ones(len(trace.transfer_begin_us), bool)
    step = trace.step_at(trace.transfer_begin_us)
    inside: Array = steps.is_decode[step.clip(0)] & (step >= 0)
    return inside
