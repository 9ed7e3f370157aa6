"""The side of ranks above 0: a pack's experts computed for rank 0, from this rank's slots."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Self

import torch

from moe_offload.errors import MoeOffloadError
from moe_offload.offload.experts.layer import ExpertLayer, StepState
from moe_offload.offload.experts.pair_outputs import ExpertFn
from moe_offload.offload.experts.residency import Residency
from moe_offload.offload.experts.warm_start import HotSetFile, WarmStart
from moe_offload.offload.experts.weights import MlpParts
from moe_offload.offload.meter import Meter
from moe_offload.offload.parallel.group import ExpertGroup
from moe_offload.offload.parallel.messages import Hint, Kind, Request, receive, send_reply
from moe_offload.offload.planning.plan import Plan

# What rank 0 may look ahead: hints for layers further away were for a step that is over.
_FURTHEST_HINT = 8


class ExpertServer:
    """One model's experts on this rank, until rank 0 closes the model. A context that closes what it holds."""

    def __init__(
        self,
        group: ExpertGroup,
        plan: Plan,
        residency: Residency,
        step: StepState,
        layers: Sequence[tuple[ExpertLayer, ExpertFn, MlpParts | None]],
        device: torch.device,
        hot_set: HotSetFile | None,
    ) -> None:
        """For `offload.parallel.loading`."""
        self.plan = plan
        self._link = group.links[0]
        self._residency, self._step, self._layers, self._device = residency, step, layers, device
        self._hot_set = hot_set
        self._meter = Meter(residency)
        self._loaded_at = self._meter.read()
        self._hinted: set[int] = set()
        if hot_set is not None:
            WarmStart(residency, hot_set.load())

    def serve(self) -> None:
        """Do what rank 0 asks for, until it closes the model; `PeerLostError` if it is gone."""
        while True:
            kind, message = receive(self._link, self._device)
            if isinstance(message, Request):
                self._compute(message)
            elif isinstance(message, Hint):
                self._hinted.add(message.layer_idx)
                self._residency.prefetch(message.layer_idx, message.expert_ids)
            elif kind is Kind.NEW_SEQUENCE:
                self._residency.new_sequence()
            elif kind is Kind.COUNTS:
                send_reply(self._link, json.dumps(asdict(self._meter.since(self._loaded_at))).encode())
            else:
                self.close()
                send_reply(self._link, b"")
                return

    @torch.inference_mode()
    def _compute(self, request: Request) -> None:
        self._step.prefill = request.prefill
        self._end_hints(request)
        layer, expert_fn, parts = self._layers[request.layer_idx]
        try:
            outputs = layer.compute_rows(request.call, request.x, request.rows_of, expert_fn, parts)
        except (MoeOffloadError, RuntimeError, OSError) as error:
            send_reply(self._link, str(error) or type(error).__name__)
            return
        send_reply(self._link, outputs, self._residency.cache.stats.num_missed("decode"))

    def _end_hints(self, request: Request) -> None:
        """Give up what was foreseen for this layer and is not asked for, and for layers whose turn has passed."""
        for layer_idx in list(self._hinted):
            if not request.layer_idx < layer_idx <= request.layer_idx + _FURTHEST_HINT:
                self._hinted.discard(layer_idx)
                wanted: Mapping[int, torch.Tensor] = request.rows_of if layer_idx == request.layer_idx else {}
                self._residency.cancel_prefetches(layer_idx, wanted)

    def close(self) -> None:
        """Stop transfers and free the slots. May be called twice."""
        if not self._step.closed:
            if self._hot_set is not None:
                self._hot_set.save(self._residency.cache.hot_set())
            self._step.closed = True
            self._residency.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
