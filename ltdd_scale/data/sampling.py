"""Orders as pure functions of (seed, epoch): any rank, any resume sees the same."""

from __future__ import annotations

import numpy as np

from ltdd_scale.runtime.ranks import rng


def uniform(num_images: int, seed: int | str, epoch: int) -> np.ndarray:
    """A permutation of all images."""
    return rng(seed, "uniform order", epoch).permutation(num_images)


def resampled(
    labels: np.ndarray,
    counts: np.ndarray,
    power: float,
    num_draws: int,
    seed: int | str,
    epoch: int,
) -> np.ndarray:
    """`num_draws` images with replacement, image i with weight n_{y_i}^(−power): power 0 is
    uniform, 1 class-balanced."""
    weight = counts[labels].astype(np.float64) ** -power
    edges = np.cumsum(weight)
    draws = rng(seed, "resampled order", epoch).random(num_draws) * edges[-1]
    return np.minimum(np.searchsorted(edges, draws, side="right"), len(labels) - 1)


def rank_slice(num: int, rank: int, world_size: int) -> slice:
    """The part of a global batch of `num` that falls to `rank`: contiguous, disjoint, complete,
    sizes differing by at most one."""
    return slice(num * rank // world_size, num * (rank + 1) // world_size)


def spread(sizes: np.ndarray, world_size: int) -> list[list[int]]:
    """Units of the given sizes over ranks, largest first onto the least loaded; ties by index, so
    every rank finds the same."""
    loads, parts = [0.0] * world_size, [[] for _ in range(world_size)]
    for unit in np.argsort(-np.asarray(sizes, np.float64), kind="stable"):
        rank = int(np.argmin(loads))
        parts[rank].append(int(unit))
        loads[rank] += float(sizes[unit])
    return [sorted(p) for p in parts]
