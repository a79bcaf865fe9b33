"""What a network costs, measured on meta tensors: FLOPs, parameters, activations. No data moves."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from ltdd_scale.models import registry

BACKWARD = 2  # a backward pass costs about two forward passes; the input's gradient alone about one
FLOAT = 4  # bytes of a float32
PASSING = 3  # activations at a time without gradients: input, output, and a shortcut beside them


@dataclass(frozen=True)
class Measures:
    """Of a backbone and one image: FLOPs of the forward pass; bytes (float32) of all activations,
    and of those that are there at a time in a pass without gradients; the number of parameters, of
    features and of BatchNorm layers."""

    flops: float
    activations: float
    passing: float
    parameters: int
    features: int
    norm_layers: int


@cache
def measure(net: str, width: int, norm: str, size: int) -> Measures:
    """Raises `UserError` for an unknown net, or one that cannot take images of `size` pixels."""
    registry.check(net, width, norm, size)
    flops, activations, largest = 0.0, 0.0, 0.0

    def count(layer: nn.Module, _: tuple, out: Tensor) -> None:
        nonlocal flops, activations, largest
        activations += FLOAT * out.numel()
        largest = max(largest, FLOAT * out.numel())
        if isinstance(layer, nn.Conv2d | nn.Linear):
            flops += 2 * layer.weight[0].numel() * out.numel()

    with registry.on_meta(net):
        model = registry.backbone(net, width, norm, size).eval()
    for layer in model.modules():
        if next(layer.children(), None) is None:
            layer.register_forward_hook(count)
    with torch.no_grad():
        model(torch.empty(1, 3, size, size, device="meta"))
    return Measures(
        flops,
        activations,
        PASSING * largest,
        sum(p.numel() for p in model.parameters()),
        registry.width_of(model),
        len(registry.norm_layers(model)),
    )


def forward(net: str, width: int, norm: str, size: int) -> float:
    """FLOPs of one image's forward pass: twice the multiplications of convolutions and linear
    layers."""
    return measure(net, width, norm, size).flops


def parameters(net: str, width: int, norm: str, size: int) -> int:
    """Number of the backbone's parameters."""
    return measure(net, width, norm, size).parameters


def features(net: str, width: int, norm: str, size: int) -> int:
    """Number of the backbone's features, which the heads take."""
    return measure(net, width, norm, size).features


def activations(net: str, width: int, norm: str, size: int) -> float:
    """Bytes of the outputs of all layers for one image, in float32: what backward keeps, about."""
    return measure(net, width, norm, size).activations


def norm_layers(net: str, width: int, norm: str, size: int) -> int:
    """Number of BatchNorm layers."""
    return measure(net, width, norm, size).norm_layers
