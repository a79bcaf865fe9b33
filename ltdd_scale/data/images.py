"""What a set of images gives to those who look at it, and a set that is held in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import torch

from ltdd_scale.data import augment
from ltdd_scale.data.augment import Views, ViewSpec

# Indices int [n] of images and their views; no views: the whole image, centred. Views of one image
# that follow each other are cut from one decoding of it.
Plan = tuple[np.ndarray, Views | None]


def runs(indices: np.ndarray, longest: int = 0) -> np.ndarray:
    """Where the runs of equal `indices` begin, int [number of runs]. A run of more than `longest`
    (0: any number) is several."""
    at = np.arange(len(indices))
    fresh = np.concatenate([[True], indices[1:] != indices[:-1]])[: len(indices)]
    if longest:
        fresh |= (at - np.maximum.accumulate(np.where(fresh, at, 0))) % longest == 0
    return np.flatnonzero(fresh)


class Images(Protocol):
    """Images to be asked for batch by batch, wherever they lie.

    `labels` int64 [N]; `sizes` int64 [N, 2], width and height, which views are drawn for; `counts`
    int64 [C], images of each class; `resolution` the side of whole images as they are shown.
    """

    labels: np.ndarray
    sizes: np.ndarray
    counts: np.ndarray
    resolution: int

    def stream(self, plans: Iterable[Plan], spec: ViewSpec) -> Iterator[torch.Tensor]:
        """Images of each plan, float [n, 3, R, R] in [0, 1], in the plans' order: views of the
        spec's resolution, whole images of the set's. Plans may be asked for a few ahead. An image
        is decoded once for views of it that follow each other."""
        ...


class MemoryImages:
    """Decoded images uint8 [N, 3, R, R] on a device, with int64 labels [N]."""

    def __init__(self, pixels: np.ndarray | torch.Tensor, labels: np.ndarray, device: torch.device):
        self.pixels = torch.as_tensor(pixels).to(device)
        self.labels = np.asarray(labels, np.int64)
        self.resolution = self.pixels.shape[-1]
        self.sizes = np.full((len(self.labels), 2), self.resolution)
        self.counts = np.bincount(self.labels)

    def stream(self, plans: Iterable[Plan], spec: ViewSpec) -> Iterator[torch.Tensor]:
        """Images of each plan, float [n, 3, R, R] in [0, 1]."""
        for indices, views in plans:
            chosen = torch.from_numpy(np.asarray(indices, np.int64)).to(
                self.pixels.device, non_blocking=True
            )
            images = self.pixels[chosen].float() / 255
            yield images if views is None else augment.apply(images, views, spec)
