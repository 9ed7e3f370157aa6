"""The policies by name."""

from collections.abc import Callable, Sequence

from moe_offload.cache import kernels
from moe_offload.cache.decay import DecayPolicy
from moe_offload.cache.lfu import LfuPolicy
from moe_offload.cache.lru import LruPolicy
from moe_offload.cache.native_policy import NativePolicy
from moe_offload.cache.policy import Policy
from moe_offload.errors import ConfigError

DEFAULT_POLICY = "recall"
LEARNED = "learned"  # what `moe_offload.cache.learned` makes of a model's own predictor; not among the names here


def _make_recall(num_experts: Sequence[int]) -> Policy:
    if "recall" in kernels.policy_names():
        return NativePolicy("recall", num_experts)
    from moe_offload.cache.recall import RecallPolicy  # numpy, which the other policies do without

    return RecallPolicy(num_experts)


_POLICIES: dict[str, Callable[[Sequence[int]], Policy]] = {
    "lru": LruPolicy,
    "lfu": LfuPolicy,
    "decay": DecayPolicy,
    "recall": _make_recall,
}


def policy_names() -> tuple[str, ...]:
    """Every name that `make_policy` takes."""
    return tuple(_POLICIES)


def make_policy(name: str, num_experts: Sequence[int]) -> Policy:
    """A fresh policy for layers of these sizes; ConfigError if the name is not known."""
    try:
        return _POLICIES[name](num_experts)
    except KeyError:
        raise ConfigError(f"unknown cache policy {name!r}; choose one of: {', '.join(_POLICIES)}") from None
