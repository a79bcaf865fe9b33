"""The recipes by which an expert is trained: what it is shown, and what it minimises.

`glmc` is the published one: two heads, two views of two streams, a consistency loss (GLMC, CVPR
2023; RLDD). `balanced` has one head and one view: the balanced softmax (Ren et al., NeurIPS 2020)
on images into which boxes of images from a re-sampled stream are pasted (CMO, CVPR 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ltdd_scale.data import augment
from ltdd_scale.experts.losses import Balanced, Debiased, Objective, class_weights
from ltdd_scale.experts.settings import Expert

PROJECTION = 256  # width of SimSiam's projector
# The mean area of CutMix's box: its side is √u, u uniform, and s² / 4 of a side s is cut off where
# the box leaves the image. ∫ (√u − u / 4)² du = 1/2 − 1/5 + 1/48.
BOX = 1 / 2 - 1 / 5 + 1 / 48


@dataclass(frozen=True)
class Mix:
    """What mixing a step's images draws from: a generator that depends on the step alone, the size
    of the global batch, and this rank's part of it."""

    generator: np.random.Generator
    batch_size: int
    part: slice


# Views of each stream, float [n, 3, R, R], and one-hot labels [n, C] of each stream → images
# [views · n, 3, R, R] and labels [views · n, C], view after view.
Mixer = Callable[[Sequence[Sequence[Tensor]], Sequence[Tensor], Mix], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Mixing:
    """`powers`: of each stream, an image of class c is drawn with weight n_c^(−power); of the first
    stream 0 is each image once an epoch. `views`: how often each image is seen, and how many views
    the network is shown."""

    powers: tuple[float, ...]
    views: int
    mix: Mixer


@dataclass(frozen=True)
class Recipe:
    """`mixing(expert)`; `objective(expert, counts, device)` with the images of each class, int [C];
    `projection(expert)`: the width of a projector, 0: none."""

    mixing: Callable[[Expert], Mixing]
    objective: Callable[[Expert, np.ndarray, torch.device], Objective]
    projection: Callable[[Expert], int]


def two_views(
    images: Sequence[Sequence[Tensor]], labels: Sequence[Tensor], draw: Mix
) -> tuple[Tensor, Tensor]:
    """View 1: MixUp of uniform and re-sampled images. View 2: CutMix of their second views.
    λ ~ Beta(1, 1), one a step as in GLMC. A `Mixer`."""
    (uniform1, uniform2), (other1, other2) = images
    mixed = float(draw.generator.random())
    boxes, lam = augment.cutmix_boxes(draw.generator, 1, uniform2.shape[-1])
    x = torch.cat(
        [
            mixed * uniform1 + (1 - mixed) * other1,
            augment.paste(uniform2, other2, boxes.repeat(len(uniform2), 0)),
        ]
    )
    y = [share * labels[0] + (1 - share) * labels[1] for share in (mixed, float(lam[0]))]
    return x, torch.cat(y)


@dataclass(frozen=True)
class Pasted:
    """CutMix of the second stream into the first, λ ~ Beta(1, 1), in a `share` of the images. A
    `Mixer`."""

    share: float

    def __call__(
        self, images: Sequence[Sequence[Tensor]], labels: Sequence[Tensor], draw: Mix
    ) -> tuple[Tensor, Tensor]:
        ((background,), (foreground,)) = images
        boxes, lam = augment.cutmix_boxes(draw.generator, draw.batch_size, background.shape[-1])
        whole = draw.generator.random(draw.batch_size) >= self.share
        boxes[whole], lam[whole] = 0, 1.0
        stays = torch.from_numpy(lam[draw.part]).to(labels[0].device, non_blocking=True)[:, None]
        x = augment.paste(background, foreground, boxes[draw.part])
        return x, stays * labels[0] + (1 - stays) * labels[1]


def unmixed(
    images: Sequence[Sequence[Tensor]], labels: Sequence[Tensor], draw: Mix
) -> tuple[Tensor, Tensor]:
    """The only view of the only stream. A `Mixer`."""
    return images[0][0], labels[0]


def prior(counts: np.ndarray, powers: Sequence[float], share: float = 0.0) -> np.ndarray:
    """How often each class is shown, float64 [C], of sum 1, by the first of the streams of `powers`
    into a `share` of whose images the second is pasted. `counts` int [C]: the images of a class."""
    weights = [counts.astype(np.float64) ** (1 - power) for power in powers]
    first, *others = [w / w.sum() for w in weights]
    return (1 - share * BOX) * first + share * BOX * others[0] if others else first


def _glmc_mixing(expert: Expert) -> Mixing:
    return Mixing((0.0, expert.resample_power), 2, two_views)


def _glmc_objective(expert: Expert, counts: np.ndarray, device: torch.device) -> Objective:
    weights = class_weights(counts, expert.reweight_power).to(device)
    return Debiased(expert.debias, expert.contrast, weights)


def _balanced_mixing(expert: Expert) -> Mixing:
    if expert.cutmix:
        return Mixing((expert.sample_power, expert.paste_power), 1, Pasted(expert.cutmix))
    return Mixing((expert.sample_power,), 1, unmixed)


def _balanced_objective(expert: Expert, counts: np.ndarray, device: torch.device) -> Objective:
    shown = prior(counts, _balanced_mixing(expert).powers, expert.cutmix)
    return Balanced(torch.from_numpy(expert.prior * np.log(shown)).float().to(device))


RECIPES: dict[str, Recipe] = {
    "glmc": Recipe(_glmc_mixing, _glmc_objective, lambda e: PROJECTION if e.contrast else 0),
    "balanced": Recipe(_balanced_mixing, _balanced_objective, lambda e: 0),
}
