"""Losses of the debiased experts (RLDD eq. 4–6; GLMC, CVPR 2023)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def class_weights(counts: np.ndarray, power: float) -> Tensor:
    """w_k = C · r_k^(−q) / Σ_j r_j^(−q), float32 [C], of mean 1. (The paper's eq. 6 prints no C·; without it the term is C times too weak.)"""
    w = counts.astype(np.float64) ** -power
    return torch.from_numpy(len(counts) * w / w.sum()).float()


def robust(prediction: Tensor, projection: Tensor) -> Tensor:
    """L_robust = −Σ_i cos(p_i, stop_grad(z_ī)) over both views, mean over the batch, for [2n, d] that hold view 1 and then view 2."""
    p1, p2 = prediction.chunk(2)
    z1, z2 = projection.detach().chunk(2)
    return -(F.cosine_similarity(p1, z2) + F.cosine_similarity(p2, z1)).mean()


def soft_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """−Σ_k w_k y_k log p_k, mean over the batch; logits and targets float [n, C]."""
    losses = -targets * F.log_softmax(logits, 1)
    return (losses if weights is None else losses * weights).sum(1).mean()


def debias(
    plain: Tensor, rebalanced: Tensor, targets: Tensor, weights: Tensor, progress: float
) -> Tensor:
    """L_debias = a · Σ_k w_k (−y_k log p^cb_k) + (1 − a) · Σ_k (−y_k log p_k) with a = (t/T)².

    `plain` are the logits of `fc`, `rebalanced` of `fc_cb`, `targets` the mixed labels, all [n, C]; `progress` is t/T.
    """
    a = progress**2
    return a * soft_cross_entropy(rebalanced, targets, weights) + (1 - a) * soft_cross_entropy(
        plain, targets
    )
