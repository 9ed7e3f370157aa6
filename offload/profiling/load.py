"""How evenly a layer's experts are used."""

import numpy as np

from moe_offload.cache.trace import Array
from moe_offload.offload.profiling.sections import ExpertLoad


def expert_load(uses: list[Array]) -> tuple[ExpertLoad, ...]:
    """``uses``: per layer, how many tokens chose each expert."""
    return tuple(_layer_load(layer, counts) for layer, counts in enumerate(uses))


def _layer_load(layer: int, counts: Array) -> ExpertLoad:
    total = max(1, int(counts.sum()))
    shares = counts[counts > 0] / total
    size = len(counts)
    ranked = np.sort(counts)
    # Gini's coefficient of the sorted counts c_1..c_n: sum (2i - n - 1) c_i / (n sum c_i).
    gini = float(((2 * np.arange(1, size + 1) - size - 1) * ranked).sum() / (size * total))
    return ExpertLoad(
        layer=layer,
        entropy_bits=abs(float(-(shares * np.log2(shares)).sum())),
        max_entropy_bits=float(np.log2(size)),
        largest_share=float(counts.max() / total),
        busiest_expert=int(counts.argmax()),
        unused=int((counts == 0).sum()),
        gini=gini,
    )
