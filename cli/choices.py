"""What the options offer, for the help pages: kept here because the registries behind some of them import torch."""

DENSE_FORMATS = ("source", "bf16", "int8", "nf4", "int4", "mxfp4", "nf3", "fp8")
FORMATS = ("auto", *DENSE_FORMATS, "mixed:BITS")
DTYPES = ("auto", "bfloat16", "float16", "float32")
MISS_PATHS = ("auto", "copy", "cpu", "split")
VERIFY = ("first", "always", "off")
GRAPHS = ("auto", "on", "off")


def policies() -> tuple[str, ...]:
    """The names of the cache policies."""
    from moe_offload.cache import LEARNED, policy_names

    return (*policy_names(), LEARNED)


def default_policy() -> str:
    """The one of them that is used where none is named."""
    from moe_offload.cache import DEFAULT_POLICY

    return DEFAULT_POLICY


def replay_policies() -> tuple[str, ...]:
    """The names of the policies that replay knows, the optimum last."""
    from moe_offload.cache.replay import replay_policies

    return replay_policies()


def presets() -> tuple[str, ...]:
    """The shapes that ``bench --like`` offers."""
    from moe_offload.offload.bench.presets import preset_names

    return preset_names()
