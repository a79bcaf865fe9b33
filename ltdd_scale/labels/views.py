"""Views of a distilled set that can be drawn again from a seed.

The views of an epoch belong to (seed, epoch, image): partner, box, crop and operations are drawn
for the whole set at once. So a stored label is found by (epoch, image) alone, whatever the batch
size of who uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ltdd_scale.data import augment
from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.images import Images
from ltdd_scale.labels import settings
from ltdd_scale.runtime.ranks import rng


@dataclass
class EpochViews:
    """The augmentation of a whole set of n images in one epoch: each image's view, its CutMix
    partner int [n], box int [n, 4] and share λ float32 [n] of the image itself."""

    views: augment.Views
    partners: np.ndarray
    boxes: np.ndarray
    lam: np.ndarray


def view_spec(views: settings.Views, resolution: int, mirror: bool) -> ViewSpec:
    """What views of side `resolution` are drawn from. `mirror`: whether some are mirrored."""
    low, high = views.crop_scale
    return ViewSpec(resolution, (low, high), 0, mirror, views.randaugment, views.magnitude)


def draw_epoch(
    spec: ViewSpec, sizes: np.ndarray, seed: int | str, epoch: int, cutmix: bool
) -> EpochViews:
    """The views of images of `sizes` int [n, 2] (width, height) in one epoch."""
    generator = rng(seed, "student views", epoch)
    views = spec.draw(generator, sizes)
    n = len(sizes)
    partners = generator.permutation(n)
    boxes, lam = augment.cutmix_boxes(generator, n, spec.resolution)
    if not cutmix:
        partners, boxes, lam = np.arange(n), np.zeros_like(boxes), np.ones_like(lam)
    return EpochViews(views, partners, boxes, lam)


def render(
    images: Images,
    epoch: EpochViews,
    batches: list[np.ndarray],
    spec: ViewSpec,
    normalize: Callable[[Tensor], Tensor],
) -> Iterator[Tensor]:
    """Normalised augmented images float [b, 3, R, R] of each batch of indices."""
    plans = []
    for indices in batches:
        partners = epoch.partners[indices]
        both = np.concatenate([indices, partners[epoch.lam[indices] < 1]])
        plans.append((both, epoch.views[both]))
    for indices, x in zip(batches, images.stream(plans, spec), strict=True):
        x = normalize(x)
        own = x[: len(indices)]
        chosen = np.flatnonzero(epoch.lam[indices] < 1)
        boxes = epoch.boxes[indices][chosen]
        if len(chosen) == len(indices):
            own = augment.paste(own, x[len(indices) :], boxes)
        elif len(chosen):
            mixed = augment.paste(own[_sent(chosen, x.device)], x[len(indices) :], boxes)
            places = np.arange(len(indices))
            places[chosen] = len(indices) + np.arange(len(chosen))
            own = torch.cat([own, mixed])[_sent(places, x.device)]
        yield own


def _sent(array: np.ndarray, device: torch.device) -> Tensor:
    """An array on the device. Nobody waits for it."""
    return torch.from_numpy(array).to(device, non_blocking=True)


@dataclass(frozen=True)
class OneHot:
    """Classes int64 [n] as a table float32 [n, C] of which only the rows asked for are made: whole,
    it would take 4·n·C bytes."""

    classes: Tensor
    num_classes: int

    @property
    def device(self) -> torch.device:
        return self.classes.device

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Rows `indices` int64 [b], on the device of the classes: float32 [b, C]."""
        every = torch.arange(self.num_classes, device=self.device)
        return (self.classes[indices][:, None] == every).float()


def mix(table: Tensor | OneHot, drawn: EpochViews, indices: np.ndarray) -> Tensor:
    """Rows `indices` of `table` [n, C], mixed as CutMix has mixed the images: [b, C]."""
    device = table.device
    lam = _sent(drawn.lam[indices], device)[:, None]
    own, partners = _sent(indices, device), _sent(drawn.partners[indices], device)
    return lam * table[own] + (1 - lam) * table[partners]


def mix_logits(
    logits: Tensor, drawn: EpochViews, indices: np.ndarray, temperature: float | None
) -> Tensor:
    """Soft labels of images that CutMix has mixed, as logits [b, C]: rows `indices` of `logits`
    [n, C] and those of their partners.

    With a `temperature` T their softmax(z / T) is the mixture of the two images', as classes are
    mixed: what a student learns by KL. The mixture of the logits is not it: its softmax leans to
    whichever image the teacher is surer of. None: the mixture of the logits, for a squared error.
    """
    if temperature is None:
        return mix(logits, drawn, indices)
    device = logits.device
    lam = _sent(drawn.lam[indices], device)[:, None]
    rows = (_sent(indices, device), _sent(drawn.partners[indices], device))
    own, partner = (F.log_softmax(logits[row] / temperature, 1) for row in rows)
    mixed = torch.logaddexp(own + lam.log(), partner + (1 - lam).log())  # log 0 adds nothing
    return temperature * mixed


def onehot(classes: np.ndarray, num_classes: int, device: torch.device) -> OneHot:
    """Classes int64 [n] as the rows that `mix` takes."""
    return OneHot(torch.from_numpy(classes).to(device), num_classes)
