"""Losses of the debiased experts (RLDD eq. 4–6; GLMC, CVPR 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

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


class Objective(Protocol):
    """What an expert minimises."""

    def __call__(self, heads: Heads, targets: Tensor, progress: float) -> Tensor:
        """(loss, its debiasing term, its robust term), float32 [3], of a batch or a part of one.

        `heads` is what `TwoHeads.heads` gives, `targets` float [n, C], `progress` t/T.
        """
        ...


@dataclass(frozen=True)
class Debiased:
    """GLMC: γ2 · 2 L_debias + γ1 · L_robust. `debias` is γ2, `contrast` γ1, `weights` are those of
    the classes, float32 [C]."""

    debias: float
    contrast: float
    weights: Tensor

    def __call__(self, heads: Heads, targets: Tensor, progress: float) -> Tensor:
        plain, rebalanced = heads[0].float(), heads[1].float()
        z, p = (None if o is None else o.float() for o in heads[2:])
        biased = debias(plain, rebalanced, targets, self.weights, progress)
        zero = torch.zeros((), device=targets.device)
        contrast = zero if z is None or p is None else robust(p, z)
        # Both views: a mean over 2n rows is half of GLMC's sum over the two views.
        return torch.stack([2 * self.debias * biased + self.contrast * contrast, biased, contrast])


@dataclass(frozen=True)
class Balanced:
    """Balanced softmax: the cross-entropy of `fc_cb`'s logits + τ log π, π how often each class is
    shown (Ren et al., NeurIPS 2020, eq. 3). After training the logits need no adjustment.

    `log_prior` is τ log π, float32 [C]; of zeros it is the plain cross-entropy.
    """

    log_prior: Tensor

    def __call__(self, heads: Heads, targets: Tensor, progress: float) -> Tensor:
        loss = soft_cross_entropy(heads[1].float() + self.log_prior, targets)
        return torch.stack([loss, loss, torch.zeros_like(loss)])
