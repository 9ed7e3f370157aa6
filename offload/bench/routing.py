"""Which experts each token goes to, apart from any model. Imports no torch."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Experts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Routing:
    """``experts`` [tokens, layers, K], best first and all different in a row; ``probs`` of the same shape, or None.

    ``note`` says where it comes from and what was done to make it fit.
    """

    experts: Experts
    probs: npt.NDArray[np.float64] | None
    note: str


@dataclass(frozen=True)
class Target:
    """The model that a routing is for, and how many tokens of it are wanted."""

    num_tokens: int
    num_layers: int
    num_experts: int
    top_k: int


def repetition(experts: Experts) -> tuple[float, float]:
    """How often consecutive tokens ``[tokens, K]`` agree: in their first choice, and in at least one of all."""
    before, after = experts[:-1], experts[1:]
    first = (before[:, 0] == after[:, 0]).mean()
    shared = (before[:, :, None] == after[:, None, :]).any(axis=(1, 2)).mean()
    return float(first), float(shared)
