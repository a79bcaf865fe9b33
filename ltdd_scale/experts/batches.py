"""What an expert sees at each step: a pure function of (seed, epoch, step), whatever the rank, the resume or the backend that decodes it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ltdd_scale.config import Expert
from ltdd_scale.data import augment, sampling
from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.runtime.ranks import Ranks, rng


class EpochPlans(Sequence):
    """The rest of an epoch, from step `first`: for each step `views`² plans of this rank's slice of the global batch.

    The uniform stream comes first, then (with 2 views) the re-sampled one; each is seen `views` times. Views are drawn when a plan is asked
    for, from (seed, epoch, step, stream, copy) alone: by whoever decodes it, and starting late costs nothing.
    """

    def __init__(
        self,
        settings: Expert,
        spec: ViewSpec,
        images,
        seed: str,
        epoch: int,
        first: int,
        steps: int,
        ranks: Ranks,
        views: int,
    ):
        self.batch_size, self.spec, self.sizes = settings.batch_size, spec, images.sizes
        self.seed, self.epoch, self.first, self.steps, self.views = seed, epoch, first, steps, views
        self.part = sampling.rank_slice(self.batch_size, ranks.rank, ranks.world)
        self.orders = [sampling.uniform(len(images.labels), seed, epoch)]
        if views > 1:
            self.orders.append(
                sampling.resampled(
                    images.labels,
                    images.counts,
                    settings.resample_power,
                    len(images.labels),
                    seed,
                    epoch,
                )
            )

    def __len__(self) -> int:
        return (self.steps - self.first) * self.views**2

    def chosen(self, step: int, stream: int) -> np.ndarray:
        """The global batch of `step`, indices [batch_size]."""
        return self.orders[stream][step * self.batch_size : (step + 1) * self.batch_size]

    def __getitem__(self, k: int):
        if not 0 <= k < len(self):
            raise IndexError(k)
        step, (stream, copy) = (
            self.first + k // self.views**2,
            divmod(k % self.views**2, self.views),
        )
        chosen = self.chosen(step, stream)
        views = self.spec.draw(
            rng(self.seed, "views", self.epoch, step, stream, copy), self.sizes[chosen]
        )
        return chosen[self.part], views[self.part]


def mix(
    pictures: list[torch.Tensor], labels: list[torch.Tensor], generator: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """View 1: MixUp of uniform and re-sampled images. View 2: CutMix of their second views. λ ~ Beta(1, 1), one a step as in GLMC.

    `pictures` are uniform, uniform again, re-sampled, re-sampled again, float [n, 3, R, R]; `labels` one-hot [n, C] of the two streams.
    Returns [2n, 3, R, R] and [2n, C], view 1 first.
    """
    uniform1, uniform2, other1, other2 = pictures
    mixed = float(generator.random())
    boxes, stays = augment.cutmix_boxes(generator, 1, uniform2.shape[-1])
    x = torch.cat(
        [
            mixed * uniform1 + (1 - mixed) * other1,
            augment.paste(uniform2, other2, boxes.repeat(len(uniform2), 0)),
        ]
    )
    y = [share * labels[0] + (1 - share) * labels[1] for share in (mixed, float(stays[0]))]
    return x, torch.cat(y)


def pieces(
    x: torch.Tensor, y: torch.Tensor, views: int, parts: int
) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    """A rank's batch in `parts` of nearly equal size, with the share of the batch that each is.

    Rows of `x` and `y` are view after view; a part has the same images of all views.
    """
    if parts == 1:
        return [(x, y, 1.0)]
    n = len(x) // views
    xs, ys = x.reshape(views, n, *x.shape[1:]), y.reshape(views, n, *y.shape[1:])
    cuts = [sampling.rank_slice(n, k, parts) for k in range(parts)]
    return [(xs[:, c].flatten(0, 1), ys[:, c].flatten(0, 1), (c.stop - c.start) / n) for c in cuts]
