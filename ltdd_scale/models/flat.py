"""A network as a function of one vector of all its parameters: what trajectories are made of."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ltdd_scale.errors import UserError
from ltdd_scale.models import registry


class Flat:
    """A backbone with one linear head as a function of its weights, a vector float [P].

    The vector holds the backbone's parameters, then those of the head, each in the order of
    ``parameters()``. `size` is P; `backbone` and `head` are the two slices of the vector.

    Raises `UserError` for a network with buffers: running statistics are no function of weights.
    """

    def __init__(self, net: str, width: int, norm: str, resolution: int, num_classes: int):
        self._made_of, self._num_classes = (net, width, norm, resolution), num_classes
        with registry.on_meta(net):
            self.model = self._build().eval()  # dropout is no function of weights either
        if next(self.model.buffers(), None) is not None:
            raise UserError(
                f"{net} with norm={norm} has BatchNorm, whose statistics are no function of the "
                "weights: use convnet3 or convnet4 with norm=instance"
            )
        named = list(self.model.named_parameters())
        self.names = [name for name, _ in named]
        self.shapes = [tuple(p.shape) for _, p in named]
        self.sizes = [p.numel() for _, p in named]
        self.size = sum(self.sizes)
        features = sum(p.numel() for p in self.model.backbone.parameters())
        self.backbone, self.head = slice(0, features), slice(features, self.size)

    def parameters(self, theta: Tensor) -> dict[str, Tensor]:
        """The vector [P] in pieces, by the names of the network's parameters."""
        parts = theta.split(self.sizes)
        shaped = zip(self.names, parts, self.shapes, strict=True)
        return {name: part.view(shape) for name, part, shape in shaped}

    def logits(self, theta: Tensor, x: Tensor) -> Tensor:
        """Logits [n, C] of normalised images [n, 3, R, R] under the weights `theta` [P].

        Always in the precision of its arguments: differences of weights are small, and bfloat16
        has three digits.
        """
        with torch.autocast(x.device.type, enabled=False):
            return torch.func.functional_call(self.model, self.parameters(theta), (x,))

    def features(self, theta: Tensor, x: Tensor) -> Tensor:
        """What the backbone gives, [n, d]; of `theta` [P] only the backbone's part counts."""
        weights = {
            name.removeprefix("backbone."): value
            for name, value in self.parameters(theta).items()
            if name.startswith("backbone.")
        }
        with torch.autocast(x.device.type, enabled=False):
            return torch.func.functional_call(self.model.backbone, weights, (x,))

    def classify(self, head: Tensor, features: Tensor) -> Tensor:
        """Logits [n, C] of features [n, d] under the head's part of the vector."""
        num_classes, width = self.model.fc.weight.shape
        weight, bias = head.split([num_classes * width, num_classes])
        return features @ weight.view(num_classes, width).T + bias

    def initial(self, *key: int | str) -> Tensor:
        """Fresh weights float32 [P] on the CPU, as the network's own initialisation draws them.
        They depend on `key` alone."""
        model: nn.Module = registry.seeded(self._build, *key)
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def _build(self) -> registry.Student:
        return registry.Student(registry.backbone(*self._made_of), self._num_classes)


@contextmanager
def in_tf32() -> Generator[None]:
    """Convolutions of a GPU in TF32, whatever runtime.precision says: stages that do not read it
    give the same bytes with any. In float32 a step takes about twice as long there."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
