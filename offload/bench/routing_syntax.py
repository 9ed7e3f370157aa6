"""How a routing is written: ``model``, ``trace:FILE[,sequence=N]``, ``synthetic:mixtral`` or
``synthetic:first=P,any=P[,skew=S]``.
"""

from pathlib import Path

from moe_offload.errors import ConfigError
from moe_offload.offload.bench.routing import Routing, Target
from moe_offload.offload.bench.settings import MODEL_ROUTING
from moe_offload.offload.bench.synthetic_routing import mixtral_routing, synthetic_routing
from moe_offload.offload.bench.trace_routing import load_trace

SYNTAX = "model, trace:FILE[,sequence=N], synthetic:mixtral or synthetic:first=P,any=P[,skew=S]"


def make_routing(text: str, target: Target, *, seed: int = 0) -> Routing | None:
    """The routing that ``text`` names, or None for the model's own; `ConfigError` for what cannot be."""
    kind, _, rest = text.partition(":")
    if text == MODEL_ROUTING:
        return None
    if kind == "trace" and rest:
        path, comma, sequence = rest.rpartition(",sequence=")
        if comma and not sequence.isdecimal():
            raise ConfigError(f"sequence {sequence!r} is not a number; routing is written {SYNTAX}")
        return load_trace(Path(path if comma else rest), target, sequence=int(sequence) if comma else None)
    if kind == "synthetic" and rest:
        if rest == "mixtral":
            return mixtral_routing(target, seed=seed)
        numbers = _numbers(rest)
        return synthetic_routing(
            target, first=numbers["first"], share=numbers["any"], skew=numbers.get("skew", 0.0), seed=seed
        )
    raise ConfigError(f"{text!r} is no routing; write {SYNTAX}")


def _numbers(text: str) -> dict[str, float]:
    numbers = {}
    for item in text.split(","):
        name, equals, value = item.partition("=")
        try:
            numbers[name.strip()] = float(value)
        except ValueError:
            equals = ""
        if not equals or name.strip() not in ("first", "any", "skew"):
            raise ConfigError(f"{item!r} in a synthetic routing is not understood; write {SYNTAX}")
    if not {"first", "any"} <= numbers.keys():
        raise ConfigError(f"a synthetic routing needs first= and any=; write {SYNTAX}")
    return numbers
