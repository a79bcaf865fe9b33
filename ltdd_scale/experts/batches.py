"""What an expert sees at each step: a pure function of (seed, epoch, step), whatever the rank, the
resume or the backend that decodes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ltdd_scale.data import sampling
from ltdd_scale.data.augment import Views, ViewSpec
from ltdd_scale.data.images import Images, Plan
from ltdd_scale.experts.recipes import Mix, Mixing
from ltdd_scale.runtime.ranks import Ranks, rng


@dataclass(frozen=True)
class Course:
    """Which images an expert sees, in which order, and how they are augmented.

    `mixing` says which streams of images there are, how often each image is seen, and how they
    become what the network is shown. `sides`: of each epoch, the side of the images in pixels
    (none: the spec's); the windows that are cut out do not depend on it.
    """

    images: Images
    spec: ViewSpec
    seed: str
    batch_size: int  # of all ranks together
    mixing: Mixing
    ranks: Ranks
    sides: Sequence[int] = ()

    def spec_at(self, epoch: int) -> ViewSpec:
        return replace(self.spec, resolution=self.sides[epoch]) if self.sides else self.spec

    @property
    def steps(self) -> int:
        """Steps of an epoch. The rest of an order that fills no batch is left out."""
        return len(self.images.labels) // self.batch_size

    @property
    def part(self) -> slice:
        """This rank's part of a global batch."""
        return sampling.rank_slice(self.batch_size, self.ranks.rank, self.ranks.world_size)


class EpochPlans(Sequence):
    """The rest of an epoch, from step `first`: for each step the plans of this rank's part of the
    global batch, one for each stream. The views of an image follow each other: it is decoded once.

    Views are drawn when a plan is asked for, from (seed, epoch, step, stream, copy) alone: by
    whoever decodes it, and starting late costs nothing.
    """

    def __init__(self, course: Course, epoch: int, first: int):
        images, seed = course.images, course.seed
        self.batch_size, self.spec, self.sizes = course.batch_size, course.spec, images.sizes
        self.seed, self.epoch, self.first, self.steps = seed, epoch, first, course.steps
        self.views, self.part = course.mixing.views, course.part
        own, *others = course.mixing.powers
        self.orders = [
            _drawn(images, own, f"{seed} first", epoch)
            if own
            else sampling.uniform(len(images.labels), seed, epoch),
            *(_drawn(images, power, seed, epoch) for power in others),
        ]

    def __len__(self) -> int:
        return (self.steps - self.first) * len(self.orders)

    def chosen(self, step: int, stream: int) -> np.ndarray:
        """The global batch of the epoch's `step`, indices [batch_size]."""
        return self.orders[stream][step * self.batch_size : (step + 1) * self.batch_size]

    def __getitem__(self, k: int) -> Plan:  # ty: ignore[incompatible-method-override]
        if not 0 <= k < len(self):
            raise IndexError(k)
        after, stream = divmod(k, len(self.orders))
        step = self.first + after
        chosen = self.chosen(step, stream)
        sizes, copies = self.sizes[chosen], []
        for copy in range(self.views):
            generator = rng(self.seed, "views", self.epoch, step, stream, copy)
            copies.append(self.spec.draw(generator, sizes)[self.part])
        return np.repeat(chosen[self.part], self.views), Views.woven(copies)


def _drawn(images: Images, power: float, seed: str, epoch: int) -> np.ndarray:
    count = len(images.labels)
    return sampling.resampled(images.labels, images.counts, power, count, seed, epoch)


@dataclass(frozen=True)
class Batch:
    """This rank's part of a step: normalised images `x` [views · n, 3, R, R] and labels `y`
    [views · n, C], view after view. `chosen` are the images that it was made of."""

    step: int  # of the whole training
    epoch: int
    ends_epoch: bool
    x: Tensor
    y: Tensor
    chosen: np.ndarray


def from_step(
    course: Course,
    begin: int,
    end: int,
    normalize: Callable[[Tensor], Tensor],
    num_classes: int,
) -> Iterator[Batch]:
    """The batches of the steps `begin` … `end` − 1 of the whole training."""
    step, steps, device = begin, course.steps, course.ranks.device
    mixing, every = course.mixing, torch.arange(num_classes, device=device)
    streams = range(len(mixing.powers))
    while step < end:
        epoch, first = divmod(step, steps)
        plans = EpochPlans(course, epoch, first)
        stream = course.images.stream(plans, course.spec_at(epoch))
        for k in range(first, steps):
            images = [normalize(next(stream)).unflatten(0, (-1, mixing.views)) for _ in streams]
            chosen = [plans.chosen(k, s)[course.part] for s in streams]
            seen = [torch.from_numpy(course.images.labels[c]) for c in chosen]
            classes = [c.to(device, non_blocking=True) for c in seen]
            labels = [(c[:, None] == every).float() for c in classes]
            draw = Mix(rng(course.seed, "mix", epoch, k), course.batch_size, course.part)
            x, y = mixing.mix([list(x.unbind(1)) for x in images], labels, draw)
            yield Batch(step, epoch, k == steps - 1, x, y, np.concatenate(chosen))
            step += 1


def micro_batches(
    x: Tensor, y: Tensor, views: int, number: int
) -> list[tuple[Tensor, Tensor, float]]:
    """A rank's batch in `number` parts of nearly equal size, with the share of it that each is.

    Rows of `x` and `y` are view after view; a part has the same images of all views.
    """
    if number == 1:
        return [(x, y, 1.0)]
    n = len(x) // views
    xs, ys = x.reshape(views, n, *x.shape[1:]), y.reshape(views, n, *y.shape[1:])
    cuts = [sampling.rank_slice(n, k, number) for k in range(number)]
    return [(xs[:, c].flatten(0, 1), ys[:, c].flatten(0, 1), (c.stop - c.start) / n) for c in cuts]
