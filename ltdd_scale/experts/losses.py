"""Losses of the debiased experts (RLDD eq. 4–6; GLMC, CVPR 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# What `TwoHeads.heads` gives: logits of fc and of fc_cb, projection and prediction.
Heads = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def class_weights(counts: np.ndarray, power: float) -> Tensor:
    """w_k = C · r_k^(−q) / Σ_j r_j^(−q), float32 [C], of mean 1.

    (The paper's eq. 6 prints no C·; without it the term is C times too weak.)
    """
    w = counts.astype(np.float64) ** -power
    return torch.from_numpy(len(counts) * w / w.sum()).float()


def robust(prediction: Tensor, projection: Tensor) -> Tensor:
    """L_robust = −Σ_i cos(p_i, stop_grad(z_ī)) over both views, mean over the batch.

    Both are [2n, d] and hold view 1, then view 2.
    """
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

    `plain` are the logits of `fc`, `rebalanced` of `fc_cb`, `targets` the mixed labels, all [n, C];
    `progress` is t/T.
    """
    a = progress**2
    return a * soft_cross_entropy(rebalanced, targets, weights) + (1 - a) * soft_cross_entropy(
        plain, targets
    )


@dataclass(frozen=True)
class Objective:
    """What an expert minimises: γ2 · 2 L_debias + γ1 · L_robust, or the plain cross-entropy of
    `fc_cb` where it is not `debiased`.

    `debias` is γ2, `contrast` γ1, `weights` are those of the classes, float32 [C].
    """

    debiased: bool
    debias: float
    contrast: float
    weights: Tensor

    def __call__(self, heads: Heads, targets: Tensor, progress: float) -> Tensor:
        """(loss, its debiasing term, its robust term), float32 [3], of a batch or a part of one.

        `heads` is what `TwoHeads.heads` gives, `targets` float [n, C], `progress` t/T.
        """
        plain, rebalanced = heads[0].float(), heads[1].float()
        z, p = (None if o is None else o.float() for o in heads[2:])
        zero = torch.zeros((), device=targets.device)
        if not self.debiased:
            loss = soft_cross_entropy(rebalanced, targets)
            return torch.stack([loss, loss, zero])
        biased = debias(plain, rebalanced, targets, self.weights, progress)
        contrast = zero if z is None or p is None else robust(p, z)
        # Both views: a mean over 2n rows is half of GLMC's sum over the two views.
        return torch.stack([2 * self.debias * biased + self.contrast * contrast, biased, contrast])
