"""The gradient of a network's weights on one class, and how far two such gradients are apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ltdd_scale.models.flat import Flat

EPSILON = 1e-6  # beside the product of the lengths: a row without gradient has no direction


def gradient(flat: Flat, theta: Tensor, x: Tensor, y: Tensor, graph: bool = False) -> Tensor:
    """∇θ of the mean cross-entropy of images [n, 3, R, R] with classes int64 [n]: float [P].

    `theta` float [P] requires a gradient. With `graph` the result can be differentiated by `x`.
    """
    loss = F.cross_entropy(flat.logits(theta, x), y)
    return torch.autograd.grad(loss, theta, create_graph=graph)[0]


def distance(flat: Flat, real: Tensor, synthetic: Tensor) -> Tensor:
    """How far two gradients [P] of a network are apart, a scalar, as DC has it:

        d(g, h) = Σ_layers Σ_rows (1 − g_r · h_r / (‖g_r‖ ‖h_r‖ + ε))

    Rows are output channels. Parameters with one dimension (biases, norms) are left out. Lengths
    have no effect, and so neither have class frequencies.
    """
    ours, theirs = flat.parameters(synthetic), flat.parameters(real)
    rows = [
        (theirs[name].flatten(1), ours[name].flatten(1))
        for name, shape in zip(flat.names, flat.shapes, strict=True)
        if len(shape) > 1
    ]
    return torch.stack([_away(g, h) for g, h in rows]).sum()


def _away(g: Tensor, h: Tensor) -> Tensor:
    """Σ over rows of 1 − cosine, of matrices [rows, d]."""
    lengths = g.norm(dim=1) * h.norm(dim=1)
    return (1 - (g * h).sum(1) / (lengths + EPSILON)).sum()
