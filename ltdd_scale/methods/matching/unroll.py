"""The gradient of trajectory matching, exact, at a memory that the number of steps does not change.

    θ_0 = start;  θ_{i+1} = θ_i − β ∇θ ℓ_i(θ_i; x_i, y_i), i < N;
    L = ‖θ_N − target‖² / ‖start − target‖²

Autograd through all steps keeps N graphs. Here a first sweep keeps the weights θ_0 … θ_N alone. A
second one goes back, with the graph of one step at a time. With g_i = ∇θ ℓ_i and v_N = ∂L/∂θ_N:

    ∂L/∂x_i −= β ∂(g_i·v_{i+1})/∂x_i     ∂L/∂y_i −= β ∂(g_i·v_{i+1})/∂y_i     ∂L/∂β −= g_i·v_{i+1}
    v_i = v_{i+1} − β ∂(g_i·v_{i+1})/∂θ_i

All four come from one backward pass. TESLA (ICML 2023), as released, leaves the last line out:
v_i = v_N. That is `exact=False`; its gradient points elsewhere (cosine .7 to .8 with the true one).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# ℓ_i(θ, x_i, y_i): step, weights [P], images [b, 3, R, R], labels [b, C] → scalar. Pure: it is
# called twice for each step, and draws the same augmentation both times.
Loss = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Segment:
    """A piece of an expert's way, and how a student goes it.

    `start`, `target`: the weights that are trained, float [P]; `compared`: the part of them that L
    looks at. `batches`: int64 [N, b] on the device, which images each step sees, each once.
    `loss` is ℓ_i. `name` is for messages.
    """

    name: str
    start: Tensor
    target: Tensor
    compared: slice
    batches: Tensor
    loss: Loss

    def distance(self, theta: Tensor) -> Tensor:
        """L of the weights that a student ends with, a scalar."""
        part = self.compared
        way = (self.start[part] - self.target[part]).square().sum()
        return (theta[part] - self.target[part]).square().sum() / way


@dataclass(frozen=True)
class Gradient:
    """`loss` is L; the others are its derivatives by the synthetic `images` [n, 3, R, R], their
    `labels` [n, C] (None where labels are not learned) and log β (`log_rate`, a scalar)."""

    loss: Tensor
    images: Tensor
    labels: Tensor | None
    log_rate: Tensor


def student(segment: Segment, images: Tensor, labels: Tensor, rate: Tensor) -> list[Tensor]:
    """θ_0 … θ_N of a student that is trained on `images` [n, 3, R, R] with `labels` [n, C], at the
    rate β."""
    theta = [segment.start]
    for step, chosen in enumerate(segment.batches):
        weights = theta[-1].detach().requires_grad_()
        loss = segment.loss(step, weights, images[chosen], labels[chosen])
        (grad,) = torch.autograd.grad(loss, weights)
        theta.append(theta[-1] - rate * grad)
    return theta


def gradient(
    segment: Segment,
    images: Tensor,
    labels: Tensor,
    rate: Tensor,
    learn_labels: bool = False,
    exact: bool = True,
) -> Gradient:
    """L of one segment and its gradient. Nothing here needs a graph of `images` or `labels`."""
    with torch.no_grad():
        images, labels, rate = images.detach(), labels.detach(), rate.detach()
    theta = student(segment, images, labels, rate)
    last = theta.pop().requires_grad_()
    loss = segment.distance(last)
    (v,) = torch.autograd.grad(loss, last)
    by_image = torch.zeros_like(images)
    by_label = torch.zeros_like(labels) if learn_labels else None
    by_rate = torch.zeros_like(rate)
    for step in range(len(theta) - 1, -1, -1):
        chosen = segment.batches[step]
        weights = theta.pop().detach().requires_grad_(True)
        x = images[chosen].requires_grad_()
        y = labels[chosen].requires_grad_(learn_labels)
        (g,) = torch.autograd.grad(segment.loss(step, weights, x, y), weights, create_graph=True)
        product = g @ v
        wanted = [x, *([y] if learn_labels else []), *([weights] if exact else [])]
        found = list(torch.autograd.grad(product, wanted))
        # Each image is once in a batch, so that nothing is added twice: the order does not matter.
        by_image[chosen] -= rate * found.pop(0)
        if by_label is not None:
            by_label[chosen] -= rate * found.pop(0)
        by_rate -= product.detach()
        if exact:
            v = v - rate * found.pop()
    return Gradient(loss.detach(), by_image, by_label, rate * by_rate)
