"""One MoE layer at run time: which rows go to which expert, and the sum of what comes back, in router order."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import nn

from moe_offload.errors import ConfigError
from moe_offload.offload.experts.host_step import HostStep
from moe_offload.offload.experts.host_values import to_host
from moe_offload.offload.experts.landing import StepAhead
from moe_offload.offload.experts.lookahead import Fetched, Prediction
from moe_offload.offload.experts.pair_outputs import ExpertFn, PairOutputs, compute_pairs, stretches
from moe_offload.offload.experts.peers import Answers, Call
from moe_offload.offload.experts.residency import ComputeTogether, Residency
from moe_offload.offload.experts.slot_experts import ABSENT, MOST_STEP_ROWS, SlotExperts, SlotRows, SlotStep
from moe_offload.offload.experts.weights import ExpertWeights, MlpParts
from moe_offload.offload.graphs.recorder import RecordingError
from moe_offload.offload.graphs.routing_record import Routing
from moe_offload.offload.graphs.step_recording import StepRecording
from moe_offload.quant.moe_layer import MoeStep

_FIRST_ROW = torch.zeros(1, dtype=torch.long)
# Routed outputs [T, K, H] are held until they are summed in router order: a longer prompt goes through in pieces.
ROUTED_BUFFER_BYTES = 64 << 20


class Predictor(Protocol):
    """Told what each layer's router chose, while the misses are on their way; may prefetch for later layers.

    What it has to ask a device for first, and wait for, can be brought to the host together with that choice.
    """

    def ask(self, layer_idx: int, *, here_only: bool = False) -> Iterable[Prediction]: ...
    def fetched(self, layer_idx: int, predictions: Sequence[Fetched]) -> None: ...
    def after_routing(self, layer_idx: int, expert_ids: Sequence[int]) -> None: ...
    def in_prompt(self, layer_idx: int, expert_ids: Sequence[int]) -> None: ...


class StoppedError(Exception):
    """Leaves a prompt in the middle because its generation was stopped; caught where the generation was begun."""


class _Pass(threading.local):
    """What is true of the forward pass that a thread is in."""

    prefill = False
    stopped: threading.Event | None = None
    recording: StepRecording | None = None


class StepState:
    """What the layers of a model share during a forward pass; each thread has a pass of its own."""

    def __init__(self) -> None:
        self.predictor: Predictor | None = None
        self.closed = False
        self._pass = _Pass()

    @property
    def prefill(self) -> bool:
        """Whether this thread's pass is a prompt."""
        return self._pass.prefill

    @prefill.setter
    def prefill(self, prefill: bool) -> None:
        self._pass.prefill = prefill

    @contextmanager
    def stoppable(self, stopped: threading.Event) -> Iterator[None]:
        """Let ``stopped`` end the prompts that this thread runs, at the next layer."""
        self._pass.stopped = stopped
        try:
            yield
        finally:
            self._pass.stopped = None

    @contextmanager
    def recorded_by(self, recording: StepRecording) -> Iterator[None]:
        """Within this, what this thread runs is recorded and not computed; experts are the recording's to call."""
        self._pass.recording = recording
        try:
            yield
        finally:
            self._pass.recording = None

    @property
    def recording(self) -> StepRecording | None:
        """What records this thread's pass."""
        return self._pass.recording

    def check_stopped(self) -> None:
        """`StoppedError` if this thread is at a prompt and was stopped; a decode step is short and ends by itself.

        `ConfigError` if the model was closed.
        """
        if self.closed:
            raise ConfigError("the model is closed: its experts are gone; load it again")
        stopped = self._pass.stopped
        if self.prefill and stopped is not None and stopped.is_set():
            raise StoppedError


class ExpertLayer:
    """The experts of one container of the model."""

    def __init__(self, layer_idx: int, num_experts: int, residency: Residency, step: StepState) -> None:
        self.layer_idx = layer_idx
        self.num_experts = num_experts
        self._residency = residency
        self._step = step

    def for_each_expert(
        self,
        expert_ids: Sequence[int],
        rows: Callable[[int], torch.Tensor],
        expert_fn: ExpertFn,
        put: Callable[[int, torch.Tensor], None],
        *,
        weights: Sequence[float] | None = None,
    ) -> None:
        """``put(expert, expert_fn(its weights, rows(expert)))`` once for each expert, in no particular order."""
        if self._step.recording is not None:
            raise RecordingError(f"the experts of layer {self.layer_idx} are called one by one")
        observer = self._residency.observer
        if observer is not None:
            observer.begin_layer(self.layer_idx, None, None)
        asked: Answers = ()
        if foreign := self._elsewhere(expert_ids):
            inputs = [rows(expert_idx) for expert_idx in foreign]
            asked = self._ask(Call.EACH, torch.cat(inputs), dict(zip(foreign, stretches(inputs), strict=True)))
        self._run_each(expert_ids, lambda e, expert_weights: put(e, expert_fn(expert_weights, rows(e))), weights)
        for expert_idx, output in asked:
            put(expert_idx, output)
        if observer is not None:
            observer.end_layer()

    def _run_each(
        self,
        expert_ids: Sequence[int],
        compute: Callable[[int, ExpertWeights], None],
        weights: Sequence[float] | None = None,
    ) -> None:
        prefill, issued = self._begin(expert_ids)
        here, weights = self._here(expert_ids, weights)
        self._residency.run(self.layer_idx, here, compute, weights=weights, prefill=prefill, issued=issued)

    # -- experts that other processes hold --

    def _elsewhere(self, expert_ids: Iterable[int]) -> list[int]:
        peers = self._residency.peers
        return [] if peers is None else [e for e in expert_ids if not peers.is_here(e)]

    def _here(
        self, expert_ids: Sequence[int], weights: Sequence[float] | None
    ) -> tuple[Sequence[int], Sequence[float] | None]:
        peers = self._residency.peers
        if peers is None:
            return expert_ids, weights
        ranks = [rank for rank, expert_idx in enumerate(expert_ids) if peers.is_here(expert_idx)]
        return [expert_ids[rank] for rank in ranks], None if weights is None else [weights[rank] for rank in ranks]

    def _ask(self, call: Call, x: torch.Tensor, rows_of: Mapping[int, torch.Tensor]) -> Answers:
        """Have those experts computed where they are, while this process computes its own; iterate to wait for it."""
        peers = self._residency.peers
        if peers is None or not rows_of:
            return ()
        self._step.check_stopped()
        return peers.ask(self.layer_idx, call, x, rows_of, prefill=self._step.prefill)

    def compute_rows(
        self,
        call: Call,
        x: torch.Tensor,
        rows_of: Mapping[int, torch.Tensor],
        expert_fn: ExpertFn,
        parts: MlpParts | None,
    ) -> torch.Tensor:
        """What another process asks for: each expert on its rows of ``x [R, H]``, one after the other ``[.., H]``.

        By the very calls that would be made if these experts were there, so the numbers are the same bits.
        """
        if call is Call.STEP:
            assert parts is not None
            step = MoeStep(parts.activation, x, list(rows_of), [0.0] * len(rows_of))
            self._run_step(step, list(rows_of), None, x, expert_fn, parts)
            return step.outputs
        outputs = PairOutputs(sum(map(len, rows_of.values())), False)
        places = dict(zip(rows_of, stretches(rows_of.values()), strict=True))
        compute = partial(compute_pairs, x, rows_of, places, outputs, expert_fn, parts if call is Call.ROWS else None)
        self._run_each(list(rows_of), compute)
        assert outputs.rows is not None
        return outputs.rows

    def _begin(self, expert_ids: Sequence[int]) -> tuple[bool, Callable[[], None] | None]:
        """Whether this is a prompt, and what to call when the misses are on their way."""
        self._step.check_stopped()
        prefill = self._step.prefill
        predictor = self._step.predictor
        if predictor is None:
            return prefill, None
        issued = partial(predictor.in_prompt if prefill else predictor.after_routing, self.layer_idx, expert_ids)
        observer = self._residency.observer
        return prefill, issued if observer is None else partial(observer.look_ahead, issued)

    def routed(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        expert_fn: ExpertFn,
        parts: MlpParts | None = None,
    ) -> torch.Tensor:
        """``sum_k weights[t, k] * expert[index[t, k]](x[t])``: ``x [T, H]``, index, weights ``[T, K]`` to ``[T, H]``.

        An index of ``num_experts`` or more stands for no expert. The sum runs over k in the router's order, in fp32,
        whatever order the experts' weights arrive in. ``parts`` tell what ``expert_fn`` is made of, if that is known:
        then one call computes all experts of a token that are there, or one expert for all its rows.
        """
        if hidden_states.requires_grad and torch.is_grad_enabled():
            raise ConfigError(
                "an offloaded model cannot be trained: its experts are overwritten before a backward pass would read "
                "them; run it in torch.no_grad(), or train the model with transformers itself"
            )
        if (recording := self._step.recording) is not None:
            on_slots = self._slot_experts(parts)
            return recording.experts(
                self.layer_idx,
                self.num_experts,
                *(hidden_states, top_k_index, top_k_weights),
                eager=partial(self._computed, hidden_states, top_k_index, top_k_weights, expert_fn, parts),
                on_slots=None if on_slots is None or on_slots.kernels.reads_slots else on_slots.compute,
            )
        num_tokens, top_k = top_k_index.shape
        chunk_tokens = max(1, ROUTED_BUFFER_BYTES // max(1, top_k * hidden_states.shape[1] * 4))
        if num_tokens <= chunk_tokens:
            return self._routed(hidden_states, top_k_index, top_k_weights, expert_fn, parts)
        chunks = [torch.split(tensor, chunk_tokens) for tensor in (hidden_states, top_k_index, top_k_weights)]
        return torch.cat(
            [self._routed(x, index, weights, expert_fn, parts) for x, index, weights in zip(*chunks, strict=True)]
        )

    # T tokens, K experts a token, H hidden; a pair is one token with one of its experts

    def _routed(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        expert_fn: ExpertFn,
        parts: MlpParts | None,
    ) -> torch.Tensor:
        observer = self._residency.observer
        if observer is not None:
            observer.begin_layer(self.layer_idx, top_k_index, top_k_weights)
        result = self._computed(hidden_states, top_k_index, top_k_weights, expert_fn, parts)
        if observer is not None:
            observer.end_layer()
        return result

    def _computed(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        expert_fn: ExpertFn,
        parts: MlpParts | None,
        known: Routing | None = None,
    ) -> torch.Tensor:
        """``known``: index and weights, where they have come to the host already."""
        on_slots = self._slot_experts(parts)
        if on_slots is not None:
            return self._routed_slots(on_slots, hidden_states, top_k_index, top_k_weights, expert_fn, parts, known)
        if top_k_index.shape[0] != 1:
            return self._routed_tokens(hidden_states, top_k_index, top_k_weights, expert_fn, parts)
        if parts is not None and MoeStep.takes(hidden_states):
            return self._routed_packed(hidden_states, top_k_index, top_k_weights, expert_fn, parts)
        return self._routed_token(hidden_states, top_k_index, top_k_weights, expert_fn, known)

    def _slot_experts(self, parts: MlpParts | None) -> SlotExperts | None:
        """The layer's experts as kernels compute them that are told slots; None where there are none such."""
        if parts is None or self._residency.peers is not None:
            return None
        return self._residency.slot_experts(self.layer_idx, parts)

    def _routed_slots(
        self,
        experts: SlotExperts,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        expert_fn: ExpertFn,
        parts: MlpParts | None,
        known: Routing | None,
    ) -> torch.Tensor:
        """On a device: those that are there in one call, then those that have come meanwhile."""
        num_tokens, top_k = top_k_index.shape
        if num_tokens > MOST_STEP_ROWS:
            return self._routed_slot_rows(experts, hidden_states, top_k_index, top_k_weights)
        miss_path, host = self._residency.miss_path, None
        if miss_path is not None and parts is not None:  # before the choice: then one wait brings both
            host = miss_path.begin(self.layer_idx, hidden_states, top_k_index, expert_fn, parts)
        both = (top_k_index.reshape(-1), top_k_weights.reshape(-1))
        index, weights = self._values(*both) if known is None else known.pairs
        is_expert = [expert_idx < self.num_experts for expert_idx in index]
        weight_of: dict[int, float] = {}
        for expert_idx, weight, counts in zip(index, weights, is_expert, strict=True):
            if counts:
                weight_of[expert_idx] = weight_of.get(expert_idx, 0.0) + weight
        ids = [expert_idx if counts else ABSENT for expert_idx, counts in zip(index, is_expert, strict=True)]
        rows = [ids[begin : begin + top_k] for begin in range(0, len(ids), top_k)]
        step = SlotStep(experts, hidden_states, rows, top_k_weights)
        if host is None:
            self._run_together(list(weight_of), step.compute, list(weight_of.values()))
            return step.result
        try:
            self._run_together(list(weight_of), step.compute, list(weight_of.values()), host)
        finally:
            host.end()
        for expert_idx, output in host.answers:
            step.put(expert_idx, output)
        return step.result

    def _routed_slot_rows(
        self,
        experts: SlotExperts,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        order, ends_of, touched, weights = self._by_expert(top_k_index, top_k_weights)
        is_partial = sum(map(len, touched.values())) < top_k_index.numel()
        rows = SlotRows(experts, hidden_states, order, ends_of, is_partial=is_partial)
        self._run_together(list(touched), rows.compute, weights)
        return self._sum(rows.outputs, top_k_index, top_k_weights, is_partial).to(hidden_states.dtype)

    def _run_together(
        self,
        expert_ids: Sequence[int],
        compute: ComputeTogether,
        weights: Sequence[float],
        host: HostStep | None = None,
    ) -> None:
        prefill, issued = self._begin(expert_ids)
        self._residency.run_together(
            self.layer_idx, expert_ids, compute, weights=weights, prefill=prefill, issued=issued, host=host
        )

    def _routed_packed(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        expert_fn: ExpertFn,
        parts: MlpParts,
    ) -> torch.Tensor:
        """A decode step by the kernels that take all experts at once."""
        (order,), (weights,) = top_k_index.tolist(), top_k_weights.tolist()
        if max(order) >= self.num_experts:
            named = [(e, weight) for e, weight in zip(order, weights, strict=True) if e < self.num_experts]
            if not named:
                return torch.zeros_like(hidden_states)
            order, weights = [e for e, _ in named], [weight for _, weight in named]
        step = MoeStep(parts.activation, hidden_states, order, weights)
        weight_of = dict(zip(order, weights, strict=True))
        asked = self._ask(Call.STEP, hidden_states, dict.fromkeys(self._elsewhere(weight_of), _FIRST_ROW))
        self._run_step(step, list(weight_of), list(weight_of.values()), hidden_states, expert_fn, parts)
        for expert_idx, output in asked:
            step.put(expert_idx, output)
        return step.result

    def _run_step(
        self,
        step: MoeStep,
        expert_ids: Sequence[int],
        weights: Sequence[float] | None,
        hidden_states: torch.Tensor,
        expert_fn: ExpertFn,
        parts: MlpParts,
    ) -> None:
        def compute(experts: Sequence[tuple[int, ExpertWeights]]) -> None:
            packed = []
            for expert_idx, expert_weights in experts:
                mlp = expert_weights.packed_mlp(parts)
                if mlp is None:
                    step.put(expert_idx, expert_fn(expert_weights, hidden_states))
                else:
                    packed.append((expert_idx, mlp))
            step.compute(packed)

        prefill, issued = self._begin(expert_ids)
        here, weights = self._here(expert_ids, weights)
        ahead = StepAhead(step, parts)
        self._residency.run_together(
            self.layer_idx, here, compute, weights=weights, prefill=prefill, issued=issued, ahead=ahead
        )

    def _routed_token(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        expert_fn: ExpertFn,
        known: Routing | None,
    ) -> torch.Tensor:
        """A decode step: so few pairs that tensors to sort and gather them would cost more than they hold."""
        index, weights = self._values(top_k_index[0], top_k_weights[0]) if known is None else known.pairs
        weight_of = {e: weight for e, weight in zip(index, weights, strict=True) if e < self.num_experts}
        outputs: dict[int, torch.Tensor] = {}

        def compute(expert_idx: int, weights: ExpertWeights) -> None:
            outputs[expert_idx] = expert_fn(weights, hidden_states)

        asked = self._ask(Call.EACH, hidden_states, dict.fromkeys(self._elsewhere(weight_of), _FIRST_ROW))
        self._run_each(list(weight_of), compute, list(weight_of.values()))
        outputs |= asked
        if not outputs:
            return torch.zeros_like(hidden_states)
        is_partial = max(index) >= self.num_experts
        if is_partial:
            nothing = torch.zeros_like(next(iter(outputs.values())))
            outputs |= {expert_idx: nothing for expert_idx in index if expert_idx >= self.num_experts}
        pairs = torch.cat([outputs[expert_idx] for expert_idx in index])
        return self._sum(pairs, top_k_index, top_k_weights, is_partial).to(hidden_states.dtype)

    def _routed_tokens(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        expert_fn: ExpertFn,
        parts: MlpParts | None,
    ) -> torch.Tensor:
        num_tokens, top_k = top_k_index.shape
        pairs_of, weights = self._assign(top_k_index, top_k_weights)
        is_partial = sum(map(len, pairs_of.values())) < num_tokens * top_k
        outputs = PairOutputs(num_tokens * top_k, is_partial)
        rows_of = {expert_idx: pairs // top_k for expert_idx, pairs in pairs_of.items()}
        asked = self._ask(Call.ROWS, hidden_states, {e: rows_of[e] for e in self._elsewhere(rows_of)})
        compute = partial(compute_pairs, hidden_states, rows_of, pairs_of, outputs, expert_fn, parts)
        self._run_each(list(pairs_of), compute, weights)
        for expert_idx, output in asked:
            outputs.room(output)[pairs_of[expert_idx]] = output
        if outputs.rows is None:
            return torch.zeros_like(hidden_states)
        return self._sum(outputs.rows, top_k_index, top_k_weights, is_partial).to(hidden_states.dtype)

    def _sum(
        self, pairs: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, is_partial: bool
    ) -> torch.Tensor:
        """The experts' outputs ``[T * K, H]`` to ``[T, H]`` in fp32; ``is_partial``: some stand for no expert."""
        routed = pairs.view(*top_k_index.shape, -1).float()
        weights = top_k_weights.float()
        if is_partial:
            weights = weights.masked_fill(top_k_index >= self.num_experts, 0.0)
        return torch.bmm(weights.unsqueeze(1), routed).squeeze(1)

    def _assign(
        self, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> tuple[dict[int, torch.Tensor], list[float]]:
        """Expert -> its pairs ``t * K + k``, the experts with the largest weights first, and those summed weights."""
        order, _, touched, weights = self._by_expert(top_k_index, top_k_weights)
        return {expert_idx: order[pairs.start : pairs.stop] for expert_idx, pairs in touched.items()}, weights

    def _by_expert(
        self, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[int, range], list[float]]:
        """Pairs ``t * K + k`` sorted by expert, where each expert's end there, and the same of those that have any.

        The experts with the largest weights first; with those summed weights.
        """
        # Sorted and searched, not counted: bincount would wait for the device, and sum in no fixed order there.
        sorted_index, order = torch.sort(top_k_index.reshape(-1), stable=True)
        experts = torch.arange(self.num_experts, device=order.device, dtype=sorted_index.dtype)
        ends_of = torch.searchsorted(sorted_index, experts, right=True)
        sums_of = top_k_weights.reshape(-1)[order].cumsum(0, dtype=torch.float64)
        ends, sums = self._values(ends_of, nn.functional.pad(sums_of, (1, 0))[ends_of])
        pairs_of = [range(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
        totals = [after - before for before, after in zip([0.0, *sums], sums, strict=False)]
        touched = [expert_idx for expert_idx, pairs in enumerate(pairs_of) if pairs]
        touched.sort(key=lambda expert_idx: -totals[expert_idx])
        return order, ends_of, {e: pairs_of[e] for e in touched}, [totals[e] for e in touched]

    def _values(self, index: torch.Tensor, weights: torch.Tensor) -> tuple[list[int], list[float]]:
        """The numbers in both; from a device with what is predicted there for later layers, so that one wait does."""
        asked = self._asked_ahead()
        index, weights, *choices = to_host([index, weights, *(choice for _, choice in asked)])
        predictor = self._step.predictor
        if asked and predictor is not None:
            ids = [choice.reshape(-1).tolist() for choice in choices]
            predictor.fetched(
                self.layer_idx, [(target_idx, own) for (target_idx, _), own in zip(asked, ids, strict=True)]
            )
        return index.tolist(), weights.tolist()

    def _asked_ahead(self) -> list[Prediction]:
        """What later layers' routers choose, launched before anybody waits; on the CPU reads are to begin first."""
        predictor = self._step.predictor
        if predictor is None or self._step.prefill or not self._residency.is_on_device(self.layer_idx):
            return []
        return list(predictor.ask(self.layer_idx))
