"""Router lookahead: later layers' routers, asked now, tell what to prefetch.

A residual stream changes little from one layer to the next, so a later layer's norm and router, applied to this
layer's residual, mostly choose what they will choose when their turn comes (Eliseev and Mazur 2023, arXiv 2312.17238).
Which norm feeds which router is found out during the first forward pass, by the storage that one hands to the other;
a router that no norm feeds takes the residual itself.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moe_offload.offload.experts.residency import Residency
from moe_offload.offload.pass_inputs import pass_tokens

_ROUTER_NAMES = ("gate", "router")
# A step of more rows than this is a prompt or a large batch: it touches most experts, so there is nothing to predict.
MAX_PREDICTED_ROWS = 8
# A prompt that uses this share of a layer's experts will use most of the next layer's: they are read ahead unasked.
PROMPT_SHARE = 0.75
# A router runs soon after its norm, so only the last outputs need to be kept to tell whose it was given.
_RECENT_NORMS = 8


def find_router(model: nn.Module, container: str) -> nn.Module | None:
    """The router beside the expert container of this name, if it is called as routers are."""
    parent = model.get_submodule(container.rpartition(".")[0])
    return next((router for n in _ROUTER_NAMES if isinstance(router := getattr(parent, n, None), nn.Module)), None)


@dataclass
class _RouterSite:
    """A layer's router, the norm before it, if any, and what it takes."""

    router: Any
    num_experts: int
    top_k: int
    is_known: bool = False  # the first forward pass has told what the router needs
    norm: Any = None
    constants: tuple[torch.Tensor | None, ...] = ()  # what the router takes besides the hidden states
    takes_rows: bool = True  # the router's input is [T, H]; else [B, S, H]

    def device(self, otherwise: torch.device) -> torch.device:
        """Where the router is."""
        weight = next(self.router.parameters(), None)
        return otherwise if weight is None else weight.device

    def predict(self, residual: torch.Tensor) -> torch.Tensor | None:
        """The experts ``[T, K]`` that this router would choose for another layer's residual ``[B, S, H]``."""
        # Of another layer, which may be on another GPU.
        residual = residual.to(self.device(residual.device), non_blocking=True)
        normed = residual if self.norm is None else self.norm.forward(residual)
        if self.takes_rows:
            normed = normed.reshape(-1, residual.shape[-1])
        output = self.router.forward(normed, *self.constants)  # past the hooks: recorders must not see a guess
        outputs = output if isinstance(output, tuple) else (output,)
        tensors = [value for value in outputs if isinstance(value, torch.Tensor)]
        for value in tensors:
            if not value.is_floating_point() and value.shape[-1] == self.top_k:
                return value
        for value in reversed(tensors):
            if value.shape[-1] == self.num_experts:
                return value.reshape(-1, self.num_experts).topk(self.top_k).indices
        return None


Prediction = tuple[int, torch.Tensor]
"""A later layer, and the experts ``[T, K]`` that its router chose ahead of time, best first."""
Fetched = tuple[int, Sequence[int]]
"""The same on the host, the experts of one token after the other."""


@dataclass(frozen=True)
class LookaheadCounts:
    """Experts that were predicted, chosen, and both."""

    predicted: int = 0
    chosen: int = 0
    right: int = 0

    @property
    def recall(self) -> float:
        """Share of the chosen experts that were predicted; 0 without any."""
        return self.right / self.chosen if self.chosen else 0.0

    def __sub__(self, earlier: "LookaheadCounts") -> "LookaheadCounts":
        return LookaheadCounts(
            self.predicted - earlier.predicted, self.chosen - earlier.chosen, self.right - earlier.right
        )


class _Pass(threading.local):
    """The forward pass that a thread is in."""

    def __init__(self) -> None:
        self.depth = 0
        self.residuals: dict[int, torch.Tensor] = {}  # layer_idx -> what its router's norm was given
        self.fetched: dict[int, Sequence[Fetched]] = {}  # layer_idx -> what was predicted there
        self.predicted: dict[int, set[int]] = {}
        self.foresaw_misses = False


class Lookahead:
    """Predicts and prefetches the experts of the next ``depth`` layers. A prediction never touches the result."""

    def __init__(self, model: nn.Module, modules: Sequence[str], top_k: Sequence[int], residency: Residency) -> None:
        """``modules``: the names of the expert containers in layer order; routers are sought beside them."""
        self.reads_prompts_ahead = False
        self._residency = residency
        self._pass = _Pass()
        self._lock = threading.Lock()
        self._counts = LookaheadCounts()
        self._guess: Callable[[int, int], Sequence[int]] | None = None
        self._sites: dict[int, _RouterSite] = {}
        for layer_idx, name in enumerate(modules):
            router = find_router(model, name)
            num_experts = getattr(model.get_submodule(name), "num_experts", 0)
            if router is not None:
                self._sites[layer_idx] = _RouterSite(router, num_experts, top_k[layer_idx])
        self._probes: list[RemovableHandle] = []
        self._recent_norms: deque[tuple[torch.Tensor, nn.Module]] = deque(maxlen=_RECENT_NORMS)
        self._begin_probe(model)

    @property
    def depth(self) -> int:
        """How many layers this thread's passes look ahead."""
        return self._pass.depth

    @depth.setter
    def depth(self, depth: int) -> None:
        self._pass.depth = depth

    @property
    def counts(self) -> LookaheadCounts:
        """Of all threads."""
        with self._lock:
            return self._counts

    @property
    def num_sites(self) -> int:
        """Layers whose router can be asked ahead of time (known after the first forward pass)."""
        return sum(site.is_known for site in self._sites.values())

    def replace_guesses(self, guess: Callable[[int, int], Sequence[int]]) -> None:
        """Let ``guess(layer_idx, target_idx)`` name what a router is taken to choose; the router is still asked.

        For benchmarks that force the routing, of which the routers know nothing.
        """
        self._guess = guess

    # -- the first forward pass --

    def _begin_probe(self, model: nn.Module) -> None:
        def norm_done(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, torch.Tensor):
                self._recent_norms.append((output, module))  # kept alive, so that no later tensor has its address

        for module in model.modules():
            if "norm" in type(module).__name__.lower():
                self._probes.append(module.register_forward_hook(norm_done))
        constants = {id(tensor) for tensor in [*model.parameters(), *model.buffers(), None]}
        for site in self._sites.values():

            def router_called(module: nn.Module, args: tuple[Any, ...], site: _RouterSite = site) -> None:
                # What changes from token to token besides the hidden states is not known ahead.
                if args and isinstance(args[0], torch.Tensor) and all(id(value) in constants for value in args[1:]):
                    address = args[0].data_ptr()
                    site.is_known, site.constants, site.takes_rows = True, args[1:], args[0].dim() == 2
                    site.norm = next((norm for out, norm in self._recent_norms if out.data_ptr() == address), None)

            self._probes.append(site.router.register_forward_pre_hook(router_called))
        self._probes.append(model.register_forward_hook(lambda *_: self._end_probe()))

    def _end_probe(self) -> None:
        for probe in self._probes:
            probe.remove()
        self._probes.clear()
        self._recent_norms.clear()
        for layer_idx, site in self._sites.items():
            if site.is_known:
                source = site.router if site.norm is None else site.norm
                source.register_forward_pre_hook(self._residual_recorder(layer_idx))

    def _residual_recorder(self, layer_idx: int) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self._pass.depth and args and args[0].shape[:-1].numel() <= MAX_PREDICTED_ROWS:
                self._pass.residuals[layer_idx] = args[0]

        return record

    # -- every decode step --

    def ask(self, layer_idx: int, *, here_only: bool = False) -> Iterator[Prediction]:
        """What later layers' routers choose for this layer's residual, once a layer and pass; nobody waits for it.

        ``here_only``: none of those that are on another device.
        """
        residual = self._pass.residuals.pop(layer_idx, None)
        if residual is None:
            return
        for target_idx in range(layer_idx + 1, layer_idx + 1 + self._pass.depth):
            target = self._sites.get(target_idx)
            if target is None or not target.is_known:
                continue
            if here_only and target.device(residual.device) != residual.device:
                continue
            with torch.no_grad():
                index = target.predict(residual)
            if index is not None:
                yield target_idx, index

    def fetched(self, layer_idx: int, predictions: Sequence[Fetched]) -> None:
        """What `ask` gave, or a recording of it, has come to the host: the next `after_routing` goes by it."""
        self._pass.fetched[layer_idx] = predictions

    def after_routing(self, layer_idx: int, expert_ids: Sequence[int]) -> None:
        """Compare with what was predicted for this layer, then predict and prefetch for the next ones."""
        here = self._pass
        predicted = here.predicted.pop(layer_idx, None)
        if predicted is not None:
            self._residency.cancel_prefetches(layer_idx, expert_ids)
            self._count(predicted, expert_ids)
        fetched: Iterable[Fetched] | None = here.fetched.pop(layer_idx, None)
        if fetched is None:
            fetched = ((target_idx, index.reshape(-1).tolist()) for target_idx, index in self.ask(layer_idx))
        for target_idx, ids in fetched:
            self._prefetch(layer_idx, target_idx, ids)

    def foresaw_misses(self) -> bool:
        """Whether anything that this thread has predicted since it last asked was in no slot."""
        here = self._pass
        foresaw, here.foresaw_misses = here.foresaw_misses, False
        return foresaw

    def _prefetch(self, layer_idx: int, target_idx: int, ids: Sequence[int]) -> None:
        if self._guess is not None:
            ids = self._guess(layer_idx, target_idx)
        site, predicted, cache = self._sites[target_idx], self._pass.predicted, self._residency.cache
        chosen = [e for e in dict.fromkeys(ids) if 0 <= e < site.num_experts]
        was_predicted = target_idx in predicted
        if was_predicted:  # from further away: this layer's residual knows better
            self._residency.cancel_prefetches(target_idx, chosen)
        predicted[target_idx] = set(chosen)
        if (observer := self._residency.observer) is not None:
            observer.predicted(layer_idx, target_idx, chosen, torch.tensor(ids).view(-1, site.top_k))
        missing = cache.missing(target_idx, chosen)
        self._pass.foresaw_misses |= bool(missing)
        if missing or was_predicted:
            self._residency.prefetch(target_idx, chosen)

    def begin_prompts_early(self, model: nn.Module, is_prompt: Callable[[], bool]) -> None:
        """Let the disk begin with the first layer when a prompt's pass does, not only when its router has chosen."""
        first = self._sites.get(0)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tokens = pass_tokens(args, kwargs)
            if first is None or tokens is None or not self.reads_prompts_ahead or not is_prompt():
                return
            num_experts = self._residency.cache.num_experts(0)
            # What so many tokens use of experts that are drawn evenly.
            share = 1 - (1 - first.top_k / num_experts) ** tokens.shape[:2].numel()
            if share >= PROMPT_SHARE:
                self._residency.prefetch(0, range(num_experts))

        model.register_forward_pre_hook(before, with_kwargs=True)

    def in_prompt(self, layer_idx: int, expert_ids: Sequence[int]) -> None:
        """Let the disk go on with the next layer when it is done with this one, while this one is computed."""
        if not self.reads_prompts_ahead:
            return
        self._residency.cancel_prefetches(layer_idx, expert_ids)
        cache, next_idx = self._residency.cache, layer_idx + 1
        if next_idx < cache.num_layers and len(expert_ids) >= PROMPT_SHARE * cache.num_experts(layer_idx):
            self._residency.prefetch(next_idx, range(cache.num_experts(next_idx)))

    def _count(self, predicted: set[int], chosen: Sequence[int]) -> None:
        with self._lock:
            counts = self._counts
            self._counts = LookaheadCounts(
                counts.predicted + len(predicted),
                counts.chosen + len(chosen),
                counts.right + len(predicted & set(chosen)),
            )
