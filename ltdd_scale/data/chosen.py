"""Which real images stand for a class, also where the class has fewer than are wanted."""

from __future__ import annotations

import numpy as np

from ltdd_scale.errors import UserError
from ltdd_scale.runtime.ranks import rng


def random_real(labels: np.ndarray, num_classes: int, ipc: int, seed: int) -> np.ndarray:
    """Indices int [C · ipc] of IPC random training images a class, class by class."""
    chosen = []
    for c in range(num_classes):
        generator = rng(seed, "random real", c)
        chosen.append(repeated(np.flatnonzero(labels == c), generator, ipc))
    return np.concatenate(chosen)


def repeated(members: np.ndarray, generator: np.random.Generator, ipc: int) -> np.ndarray:
    """`ipc` of `members` in random order, every one once before any a second time."""
    if not len(members):
        raise UserError("a class has no training images to choose from")
    passes = -(-ipc // len(members))
    return np.concatenate([generator.permutation(members) for _ in range(passes)])[:ipc]
