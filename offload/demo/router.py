"""Routers from k-means: which expert a hidden state prefers is the cluster that it lies in."""

import torch
import torch.nn.functional as F
from torch import Tensor

KMEANS_STARTS = 3  # the best is kept: one start often merges two clusters
KMEANS_STEPS = 25
BALANCE_STEPS = 200
FIRST_CHOICE_WEIGHT = 0.7  # mean weight of the first of two experts, about that of a trained Mixtral


def fit_router(states: Tensor, *, num_experts: int, top_k: int, seed: int) -> Tensor:
    """The gate ``[E, H]``, for a router without bias, fitted to an MoE layer's inputs ``[T, H]``.

    Its rows are the centroids of a spherical k-means on the centred states. The centring and a term per expert that
    evens out the load are offsets; a gate without bias gets them along the direction in which every state has about
    the same coordinate.
    """
    generator = torch.Generator().manual_seed(seed)
    mean = states.mean(0)
    centroids = _kmeans(F.normalize(states - mean, dim=1), num_experts, generator)
    ones = _constant_direction(states)
    gate = centroids - (centroids @ mean)[:, None] * ones
    gate = gate + _balancing_offsets(states @ gate.T, states @ ones, top_k)[:, None] * ones
    return gate * _sharpness(states @ gate.T)


def _kmeans(points: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Centroids ``[E, H]`` of points ``[T, H]``: the best of several starts of Lloyd's algorithm."""
    starts = [_lloyd(points, _spread_points(points, num_clusters, generator)) for _ in range(KMEANS_STARTS)]
    return min(starts, key=lambda centroids: _square_distances(points, centroids).amin(1).sum().item())


def _spread_points(points: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Points to start from, each drawn with a chance that grows with its distance from the others (k-means++)."""
    chosen = points[torch.randint(len(points), (1,), generator=generator)]
    while len(chosen) < num_clusters:
        distances = _square_distances(points, chosen).amin(1)
        chosen = torch.cat([chosen, points[torch.multinomial(distances, 1, generator=generator)]])
    return chosen


def _lloyd(points: Tensor, centroids: Tensor) -> Tensor:
    nearest = torch.empty(0)
    for _ in range(KMEANS_STEPS):
        previous, nearest = nearest, _square_distances(points, centroids).argmin(1)
        if torch.equal(previous, nearest):
            break
        member = F.one_hot(nearest, len(centroids)).to(points)
        counts = member.sum(0)[:, None]
        centroids = torch.where(counts > 0, member.T @ points / counts.clamp(min=1), centroids)
    return centroids


def _square_distances(points: Tensor, centroids: Tensor) -> Tensor:
    """Squared distances ``[T, E]``, for points of length one."""
    return (1 - 2 * points @ centroids.T + centroids.square().sum(1)).clamp(min=0)


def _constant_direction(states: Tensor) -> Tensor:
    """The ``u`` ``[H]`` for which ``states @ u`` is nearest to one everywhere (ridge regression)."""
    gram = states.T @ states
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram))
    direction: Tensor = torch.linalg.solve(gram + ridge, states.sum(0))
    return direction


def _balancing_offsets(logits: Tensor, ones: Tensor, top_k: int) -> Tensor:
    """Offsets ``[E]`` that even out the load of logits ``[T, E]``: lowered where an expert has more than its share.

    The rule is the auxiliary-loss-free balancing of Wang et al. 2024 (arXiv 2408.15664), with a shrinking step.
    """
    num_tokens, num_experts = logits.shape
    offsets = torch.zeros(num_experts)
    step = 0.1 * logits.std()
    for _ in range(BALANCE_STEPS):
        chosen = (logits + ones[:, None] * offsets).topk(top_k).indices
        load = torch.bincount(chosen.flatten(), minlength=num_experts) * num_experts / (num_tokens * top_k)
        offsets -= step * (load - 1).clamp(-1, 1)
        step = step * 0.985
    return offsets


def _sharpness(logits: Tensor) -> float:
    """The factor that gives the better of a token's two experts `FIRST_CHOICE_WEIGHT` on average."""
    best = logits.topk(2).values
    margins = best[:, 0] - best[:, 1]
    low, high = 1e-4, 1e4
    for _ in range(60):
        middle = (low * high) ** 0.5
        if torch.sigmoid(middle * margins).mean() < FIRST_CHOICE_WEIGHT:
            low = middle
        else:
            high = middle
    return high
