"""Sides of the images while they are recovered: FADRM's stages of other resolutions."""

from __future__ import annotations

import torch
from torch import Tensor

from ltdd_scale.data import augment
from ltdd_scale.methods.rldd.settings import Recover


def stages(settings: Recover, size: int) -> dict[int, int]:
    """First iteration of each stage → side of the images in it; stages are equally long."""
    sides = settings.resolutions or [size]
    return {settings.iterations * k // len(sides): side for k, side in enumerate(sides)}


def mixed(images: Tensor, initial: Tensor, side: int, residual: float) -> Tensor:
    """FADRM: on to the next stage's `side`, a share `residual` of the initial image mixed in."""
    return (1 - residual) * resized(images, side) + residual * resized(initial, side)


def resized(images: Tensor, side: int) -> Tensor:
    """Whole images [n, 3, H, H] at another side."""
    if images.shape[-1] == side:
        return images
    n, device = len(images), images.device
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).to(device, non_blocking=True).expand(n, -1)
    return augment.crop_resize(images, whole, torch.zeros(n, dtype=torch.bool, device=device), side)
