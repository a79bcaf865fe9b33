"""Mean features of classes under networks with random weights (DM, Zhao and Bilen, WACV 2023)."""

from __future__ import annotations

from torch import Tensor, nn

from ltdd_scale.data import siamese
from ltdd_scale.models import frozen, registry
from ltdd_scale.runtime.ranks import Ranks

Shape = tuple[str, int, str, int]  # net, width, norm, size: as `registry.backbone` takes them


def network(made_of: Shape, ranks: Ranks, *key: int | str) -> nn.Module:
    """Random features, [n, 3, R, R] → [n, d], that depend on `key` alone."""

    def build() -> nn.Module:
        return registry.backbone(*made_of)

    net = registry.seeded(build, *key)
    return ranks.to_device(net).eval().requires_grad_(False)


def mean_features(
    net: nn.Module, images: Tensor, draw: siamese.Draw, ranks: Ranks, classes: int = 1
) -> Tensor:
    """Mean features of each class, float32 [classes, d].

    `images` float32 [n, 3, R, R], normalised, class after class and as many of each; they are seen
    after `draw`.
    """
    seen = frozen.forward(net, siamese.apply(images, draw), ranks)
    return seen.unflatten(0, (classes, -1)).mean(1)


def distance(real: Tensor, synthetic: Tensor) -> Tensor:
    """Σ_c ‖real_c − synthetic_c‖² of mean features [classes, d]."""
    return (real - synthetic).square().sum()
