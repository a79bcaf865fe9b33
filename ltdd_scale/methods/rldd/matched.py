"""The matching term of recovery: mean features of each class under random networks, as DM has them.

    1 / (C d) · Σ_c ‖ mean f_θ(A(B_c)) − mean f_θ(A(S_c)) ‖²   (DM, Zhao and Bilen, WACV 2023)

S_c are the chunk's images of class c of C, whole; B_c real ones of it; f_θ the d features of an
untrained ConvNet-3; A one Siamese augmentation. DM has the sum; the mean weighs an image the same
whatever the width, the resolution and the number of classes, as the other terms do. Network,
augmentation and real images are new in each iteration, and keyed by (seed, chunk, iteration).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltdd_scale.data import chosen, siamese
from ltdd_scale.errors import UserError
from ltdd_scale.methods.matching import features
from ltdd_scale.methods.matching.features import Shape, distance, mean_features
from ltdd_scale.methods.matching.real import Pixels, RealSet, open_real
from ltdd_scale.methods.rldd.chunks import Chunk
from ltdd_scale.methods.rldd.settings import Recover
from ltdd_scale.models import registry
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import Ranks, rng
from ltdd_scale.stage import Given

HELD = 512  # real images of a class that a chunk draws from, at most


def held(settings: Recover) -> int:
    """The same, where its iterations look at fewer: no image is decoded that none of them sees."""
    return min(HELD, settings.iterations * settings.matching_real)


@dataclass(frozen=True)
class Source:
    """What all chunks share. `strategy`: the changes that an iteration draws one of."""

    real: RealSet
    pixels: Pixels
    settings: Recover
    seed: int
    strategy: tuple[str, ...]
    ranks: Ranks

    def of(self, chunk: Chunk) -> Matched:
        """The term of `chunk`, with the real images of its classes."""
        most = held(self.settings)
        real = self.real.some(chunk.classes, most, self.seed, "recover held")
        return Matched(self, chunk.number, *real)


@dataclass(frozen=True)
class Matched:
    """The term of one chunk. `real` uint8 [N, 3, R, R] on the device: images of the chunk's
    classes, class after class, `counts` of each."""

    source: Source
    number: int
    real: Tensor
    counts: list[int]

    def draw(self, iteration: int) -> np.ndarray:
        """Which of `real` an iteration looks at, int64 [classes, `matching_real`]: of a class each
        once before any a second time."""
        own, edges = self.source, np.cumsum([0, *self.counts])
        generator = rng(own.seed, "recover real", self.number, iteration)
        drawn = [
            chosen.repeated(np.arange(first, last), generator, own.settings.matching_real)
            for first, last in pairwise(edges)
        ]
        return np.stack(drawn)

    def loss(self, images: Tensor, iteration: int) -> Tensor:
        """Of the chunk's images [n, 3, R, R], normalised, class after class: a scalar that knows
        their gradient."""
        own = self.source
        settings, size, key = own.settings, self.real.shape[-1], (self.number, iteration)
        shape = network_shape(settings, size)
        net = features.network(shape, own.ranks, own.seed, "recover net", *key)
        draw = siamese.draw(rng(own.seed, "recover dsa", *key), own.strategy, size)
        at = torch.from_numpy(self.draw(iteration)).to(images.device, non_blocking=True)
        goals = []
        with torch.no_grad():
            for some in at.split(together(settings)):
                shown = own.pixels.normalized(self.real[some.flatten()])
                goals.append(mean_features(net, shown, draw, own.ranks, len(some)))
        found = mean_features(net, images, draw, own.ranks, len(self.counts))
        return distance(torch.cat(goals), found) / found.numel()


def source(settings: Given, context: Context, mine: Sequence[Chunk]) -> Source:
    """What the chunks `mine`, this rank's, are matched with."""
    seen, most = settings.images, held(settings.recover)

    def looks(counts: np.ndarray) -> int:
        return sum(int(np.minimum(counts[list(chunk.classes)], most).sum()) for chunk in mine)

    pixels, real = open_real(settings.ipc, settings.seed, seen, context, looks)
    strategy = siamese.choices(siamese.ALL, seen.mirror)
    return Source(real, pixels, settings.recover, settings.seed, strategy, context.ranks)


def network_shape(settings: Recover, size: int) -> Shape:
    """The random network: without BatchNorm, so that an image's features do not depend on what is
    beside it."""
    return "convnet3", settings.matching_width, "instance", size


def together(settings: Recover) -> int:
    """Classes whose real images go through the network at once: about as many images as a chunk
    has."""
    return max(1, settings.batch_size // settings.matching_real)


def check(settings: Any) -> None:
    """Raise `UserError` where the random network cannot take the images. `settings` is what the
    stage reads."""
    if not settings.recover.matching:
        return
    try:
        registry.check(*network_shape(settings.recover, settings.images.resolution))
    except UserError as error:
        raise UserError(f"recover.matching: {error}; or set recover.matching=0") from None
