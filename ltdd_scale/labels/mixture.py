"""A soft label's share of the class: what an image shows is known, whatever the teacher says."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def with_class(logits: Tensor, classes: Tensor, share: float) -> Tensor:
    """Logits of p = (1 − λ) · softmax(`logits`) + λ · `classes`, with λ = `share` in [0, 1).

    `logits` and `classes` float [n, C]; rows of the second are probabilities, mixed as the images
    are. With λ = 0 the logits are given back untouched.

    Logits of p are log p and any constant. A softmax does not see it, a squared error does: log p
    alone has the mean −log Σ exp z + mean z, which differs from image to image by how sure the
    teacher is, and a student would have to learn that too. Each row is moved to the mean of its raw
    logits z. Of all constants this one is nearest to z in squared error, and the labels go to z as
    λ goes to 0: what λ changes is the class's share, and nothing beside. (τ·log π is centred in
    `adjust.shift_of` for the same reason.)
    """
    if not share:
        return logits
    kept = F.log_softmax(logits, 1) + math.log1p(-share)
    log_p = torch.logaddexp(kept, classes.log() + math.log(share))  # log 0 adds nothing
    return log_p + (logits - log_p).mean(1, keepdim=True)
