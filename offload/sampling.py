"""How tokens are drawn, as transformers wants it said."""

import copy

from transformers import GenerationConfig

from moe_offload.errors import ConfigError


def sampling_config(
    defaults: GenerationConfig,
    *,
    max_new_tokens: int,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
) -> GenerationConfig:
    """A generation config that samples at ``temperature``, or is greedy without one; `ConfigError` for bad values."""
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}; it must be 1 or more")
    if temperature is not None and not 0 <= temperature <= 100:
        raise ConfigError(f"temperature is {temperature}; it must be from 0 (greedy) to 100")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p is {top_p}; it must be above 0 and at most 1")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k is {top_k}; it must be 1 or more")
    config = copy.deepcopy(defaults)
    config.max_new_tokens, config.max_length = max_new_tokens, None
    config.do_sample = bool(temperature)
    config.temperature, config.top_p, config.top_k = (temperature, top_p, top_k) if temperature else (None, None, None)
    config.min_p = config.typical_p = None
    config.num_beams = 1
    return config
