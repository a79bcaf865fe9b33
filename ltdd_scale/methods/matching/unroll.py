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

from ltdd_scale.models.captured import Captured

# Weights [P], augmented images [b, 3, R, R], `Segment.fixed` → logits [b, C].
Network = Callable[[Tensor, Tensor, Tensor], Tensor]
# Logits [b, C], labels [b, C] → ℓ, a scalar.
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Segment:
    """A piece of an expert's way, and how a student goes it.

    `start`, `target`: the weights that are trained, float [P]; `compared`: the part of them that L
    looks at. `batches`: int64 [N, b] on the device, which images each step sees, each once.
    `augment(i, x)` changes the images of step i, the same way at each call. `logits` and `loss` are
    the network and ℓ, the same objects for all segments of a kind; `fixed` is a tensor that the
    network needs beside (weights that are not trained). `name` is for messages.
    """

    name: str
    start: Tensor
    target: Tensor
    compared: slice
    batches: Tensor
    augment: Callable[[int, Tensor], Tensor]
    logits: Network
    loss: Loss
    fixed: Tensor

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


class Unroll:
    """Students and their gradients. `learn_labels`: by the labels too. `exact`: see above.

    Nothing here needs a graph of images or labels. On a GPU the work of a step is captured once for
    each loss.
    """

    def __init__(self, learn_labels: bool = False, exact: bool = True):
        self.learn_labels, self.exact = learn_labels, exact
        self._captured: dict[tuple[Network, Loss], tuple[Captured, Captured]] = {}

    def student(
        self, segment: Segment, images: Tensor, labels: Tensor, rate: Tensor
    ) -> list[Tensor]:
        """θ_0 … θ_N of a student that is trained on `images` [n, 3, R, R] with `labels` [n, C], at
        the rate β."""
        step, _ = self._steps(segment.logits, segment.loss)
        theta = [segment.start]
        for i, chosen in enumerate(segment.batches):
            x = segment.augment(i, images[chosen])
            theta += step(theta[-1], x, labels[chosen], segment.fixed, rate)
        return theta

    def gradient(self, segment: Segment, images: Tensor, labels: Tensor, rate: Tensor) -> Gradient:
        """L of one segment and its gradient."""
        images, labels, rate = images.detach(), labels.detach(), rate.detach()
        theta = self.student(segment, images, labels, rate)
        last = theta.pop().detach().requires_grad_()
        loss = segment.distance(last)
        (v,) = torch.autograd.grad(loss, last)
        _, back = self._steps(segment.logits, segment.loss)
        by_image, by_rate = torch.zeros_like(images), torch.zeros_like(rate)
        by_label = torch.zeros_like(labels)
        for i in range(len(theta) - 1, -1, -1):
            chosen = segment.batches[i]
            x = images[chosen].requires_grad_()
            seen = segment.augment(i, x)
            product, by_seen, by_y, by_theta = back(
                theta.pop(), seen.detach(), labels[chosen], segment.fixed, v
            )
            # Each image is once in a batch: nothing is added twice, so no order matters.
            by_image[chosen] -= rate * torch.autograd.grad(seen, x, by_seen)[0]
            if self.learn_labels:
                by_label[chosen] -= rate * by_y
            by_rate -= product
            if self.exact:
                v = v - rate * by_theta
        learned = by_label if self.learn_labels else None
        return Gradient(loss.detach(), by_image, learned, rate * by_rate)

    def _steps(self, logits: Network, loss: Loss) -> tuple[Captured, Captured]:
        """One step of a student, (θ, x, y, fixed, β) → (next θ,); and the way back over it,
        (θ, x, y, fixed, v) → (g·v, its gradients by x, y and θ)."""
        key = logits, loss
        if key in self._captured:
            return self._captured[key]
        learn_labels, exact = self.learn_labels, self.exact  # not self: see `Captured`

        def step(*given: Tensor) -> tuple[Tensor, ...]:
            theta, x, y, fixed, rate = given
            weights = theta.detach().requires_grad_()
            (grad,) = torch.autograd.grad(loss(logits(weights, x, fixed), y), weights)
            return (theta - rate * grad,)

        def back(*given: Tensor) -> tuple[Tensor, ...]:
            theta, x, y, fixed, v = (value.detach() for value in given)
            weights, x = theta.requires_grad_(), x.requires_grad_()
            y = y.requires_grad_(learn_labels)
            value = loss(logits(weights, x, fixed), y)
            (g,) = torch.autograd.grad(value, weights, create_graph=True)
            product = g @ v
            wanted = [x, *([y] if learn_labels else []), *([weights] if exact else [])]
            found = list(torch.autograd.grad(product, wanted))
            by_x = found.pop(0)
            by_y = found.pop(0) if learn_labels else y.new_zeros(())
            by_theta = found.pop() if exact else v.new_zeros(())
            return product.detach(), by_x, by_y, by_theta

        self._captured[key] = Captured(step), Captured(back)
        return self._captured[key]
