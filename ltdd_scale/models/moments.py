"""Moments of activations: the one definition that calibration measures and recovery aligns with."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ltdd_scale.errors import UserError
from ltdd_scale.models import kernels

BLOCK = 256  # positions added in float32 before float64 takes over


@lru_cache(maxsize=256)
def _block(positions: int) -> int:
    return next(b for b in range(min(BLOCK, positions), 0, -1) if positions % b == 0)


def position_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """Σ x and Σ x² over the positions of each image and channel of x [n, C, H, W]: float64 [n, C].

    On a CPU blocks of at most 256 positions are added in float32 (squares as a norm, which torch
    reduces as fast as it reads) and the blocks in float64: 4 times (7 × 7 positions) to 50 times
    (32 × 32) as fast as a float64 reduction. The rounding, about 1e-7 of a block, is that of the
    activations themselves. A GPU adds float32 as a tree, which rounds as little, and makes no copy.
    """
    n, c, h, w = x.shape
    if kernels.on_gpu(x):
        norms = torch.linalg.vector_norm(x, dim=(2, 3), dtype=torch.float32)
        return x.sum((2, 3), dtype=torch.float32).double(), norms.double().square()
    block = _block(h * w)
    blocks = x.float().reshape(n, c, h * w // block, block)
    return blocks.sum(3).sum(2, dtype=torch.float64), torch.linalg.vector_norm(
        blocks, dim=3
    ).double().square().sum(2)


def fair_statistics(moments: Tensor, variance: str) -> tuple[Tensor, Tensor]:
    """Mean and variance, float64 [C], of the population in which every class weighs the same.

    `moments` float64 [K, 1 + 2C] holds each class's count, sums and sums of squares. ``mixture``:
    var = mean_c E_c[x²] − μ², exact for the class-balanced population; ``within``: mean_c σ²_c,
    which leaves out the spread between classes. Raises `UserError` for a class without images.
    """
    count, channels = moments[:, :1], (moments.shape[1] - 1) // 2
    if (count == 0).any():
        raise UserError(
            f"calibrate: class {int((count[:, 0] == 0).nonzero()[0])} has no images; "
            "it cannot have statistics"
        )
    means, squares = moments[:, 1 : 1 + channels] / count, moments[:, 1 + channels :] / count
    mean = means.mean(0)
    var = squares.mean(0) - mean**2 if variance == "mixture" else (squares - means**2).mean(0)
    return mean, var.clamp(min=0)
