"""Finding the experts of a transformers model, whatever its family calls them.

transformers decorates most expert classes with ``use_experts_implementation``; the others are known here by name.
A container's experts all have the same shapes, and each parameter of one expert becomes one part of the pack.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from moe_offload.errors import UnsupportedModelError


@dataclass(frozen=True)
class ExpertParam:
    """One parameter of one expert, as the model holds it.

    ``target`` is the name in the model's state dict, with ``{expert}`` in it where every expert is a module of its own.
    ``shape`` is one expert's. ``transposed``: the model multiplies ``x @ W`` with ``W [in, out]``; packs hold
    ``[out, in]``. ``stacked_rows``: the model stacks the experts' rows in a 2-D parameter (DBRX).
    """

    part: str
    target: str
    shape: tuple[int, ...]
    transposed: bool = False
    stacked_rows: int | None = None

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """The shape in the pack: ``[out, in]``, or ``[out]`` for a bias."""
        return self.shape[::-1] if self.transposed else self.shape


@dataclass(frozen=True)
class ExpertContainer:
    """A module that holds experts: its name in the model, the family's kind, and its experts' parameters."""

    name: str
    module: nn.Module
    kind: str
    num_experts: int
    params: tuple[ExpertParam, ...]


def _fused(name: str, module: nn.Module, num_experts: int, transposed: bool) -> tuple[ExpertParam, ...]:
    """Parameters ``[num_experts, ...]``; LongCat's gate has rows for its identity experts too, which hold nothing."""
    return tuple(
        ExpertParam(part, f"{name}.{part}", tuple(param.shape[1:]), transposed=transposed and param.dim() == 3)
        for part, param in module._parameters.items()
        if param is not None and param.shape[0] >= num_experts
    )


def _decorated(name: str, module: Any) -> ExpertContainer:
    params = _fused(name, module, module.num_experts, module.is_transposed)
    return ExpertContainer(name, module, "decorated", module.num_experts, params)


def _longcat(name: str, module: Any) -> ExpertContainer:
    num_experts = module.num_routed_experts
    return ExpertContainer(name, module, "longcat", num_experts, _fused(name, module, num_experts, False))


def _gated(name: str, module: Any) -> ExpertContainer:
    return ExpertContainer(name, module, "gated", module.num_experts, _fused(name, module, module.num_experts, False))


def _llama4(name: str, module: Any) -> ExpertContainer:
    return ExpertContainer(name, module, "llama4", module.num_experts, _fused(name, module, module.num_experts, True))


def _jetmoe(name: str, module: Any) -> ExpertContainer:
    return ExpertContainer(name, module, "jetmoe", module.num_experts, _fused(name, module, module.num_experts, False))


def _dbrx(name: str, module: Any) -> ExpertContainer:
    rows, hidden = module.ffn_hidden_size, module.hidden_size
    params = tuple(
        ExpertParam(part, f"{name}.mlp.{part}", (rows, hidden), transposed=part == "w2", stacked_rows=rows)
        for part in ("w1", "v1", "w2")
    )
    return ExpertContainer(name, module, "dbrx", module.num_experts, params)


def _module_dict(name: str, module: Any) -> ExpertContainer:
    kind = "switch" if type(module).__name__ == "SwitchTransformersExperts" else "nllb"
    params = tuple(
        ExpertParam(part, f"{name}.expert_{{expert}}.{part}", tuple(param.shape))
        for part, param in module["expert_0"].named_parameters()
    )
    return ExpertContainer(name, module, kind, module.num_experts, params)


_UNDECORATED: dict[str, Callable[[str, Any], ExpertContainer]] = {
    "DbrxExperts": _dbrx,
    "JetMoeParallelExperts": _jetmoe,
    "Llama4TextExperts": _llama4,
    "LongcatFlashExperts": _longcat,
    "NllbMoeExperts": _module_dict,
    "Step3p7Experts": _gated,
    "SwitchTransformersExperts": _module_dict,
}


def _containers(model: nn.Module) -> Iterator[ExpertContainer]:
    for name, module in model.named_modules():
        if hasattr(module, "is_concatenated") and hasattr(module, "has_gate"):
            yield _decorated(name, module)
        elif describe := _UNDECORATED.get(type(module).__name__):
            yield describe(name, module)


def _unknown_experts(model: nn.Module, containers: list[ExpertContainer]) -> set[str]:
    """Class names of what looks like experts and is in no container; shared experts, which every token uses, do not."""
    known = tuple(f"{container.name}." for container in containers)
    around = {name[: i + 1] for name in known for i, letter in enumerate(name) if letter == "."}
    unknown = set()
    for name, module in model.named_modules():
        class_name, attribute = type(module).__name__, name.rpartition(".")[2]
        if f"{name}.".startswith(known) or f"{name}." in around or "shared" in f"{class_name}.{attribute}".lower():
            continue
        stacked = any(param is not None and param.dim() == 3 for param in module._parameters.values())
        if attribute == "experts" and next(module.parameters(), None) is not None:
            children = list(module.children())
            is_list = isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) and children
            unknown.add(type(children[0]).__name__ if is_list else class_name)
        elif "Expert" in class_name and stacked:
            unknown.add(class_name)
    return unknown


def find_expert_containers(model: nn.Module) -> list[ExpertContainer]:
    """All containers in the order of the model's modules; `UnsupportedModelError` names what is not known."""
    containers = list(_containers(model))
    if unknown := sorted(_unknown_experts(model, containers)):
        raise UnsupportedModelError(
            f"{type(model).__name__} holds experts of a class that is not known here: {', '.join(unknown)}; "
            "run it with transformers itself"
        )
    if not containers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no experts: there is nothing to offload; run it with transformers itself"
        )
    return containers
