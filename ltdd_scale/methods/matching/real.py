"""The real images that matching methods look at, class by class, and where synthetic ones start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltdd_scale.data import chosen, distilled, whitening
from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.backend import fits_memory
from ltdd_scale.data.images import Images
from ltdd_scale.data.loader import open_images, stream_images
from ltdd_scale.data.settings import Seen
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.data.whitening import Whitening
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import Ranks, rng

DECODED = 256  # images decoded at once


@dataclass(frozen=True)
class Pixels:
    """The normalisation of the real set: `mean`, `std` float32 [1, 3, 1, 1]. Where there is a
    `whitening`, normalised images are whitened ones."""

    mean: Tensor
    std: Tensor
    whitening: Whitening | None = None

    @staticmethod
    def of(split: ShardSplit, device: torch.device, zca: Path | None = None) -> Pixels:
        """`zca`: the folder of the stage "whiten", where there is one."""
        mean, std = (
            torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (split.mean, split.std)
        )
        white = None if zca is None else whitening.load(zca / whitening.FILE, device)
        return Pixels(mean, std, white)

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def normalized(self, pixels: Tensor) -> Tensor:
        """uint8 [n, 3, R, R] → float32 of the same shape."""
        if self.whitening is not None:
            return self.whitening(pixels.float() / 255)
        return (pixels.float() / 255 - self.mean) / self.std

    def clamp(self, images: Tensor, ranks: Ranks | None = None) -> None:
        """Back to valid pixels, in place: what is learned is what an 8-bit image can show.

        `ranks`: where all of them hold the same images.
        """
        if self.whitening is None:
            images.data.clamp_((0 - self.mean) / self.std, (1 - self.mean) / self.std)
            return
        self.whitening.clamp(images.data)
        if ranks is not None:
            # Of products different GPUs could differ in the last bits.
            ranks.broadcast_tensor(images.data)

    def to_uint8(self, images: Tensor) -> np.ndarray:
        """Normalised images [n, 3, R, R] → uint8."""
        if self.whitening is not None:
            return distilled.to_uint8(self.whitening.back(images))
        return distilled.to_uint8(images * self.std + self.mean)


@dataclass(frozen=True)
class RealClass:
    """One class of the real set: `pixels` uint8 [n_c, 3, R, R] on the device; `start` int64 [IPC],
    which of them the synthetic images start from, each once before any a second time."""

    label: int
    pixels: Tensor
    start: np.ndarray

    def batch(self, most: int, seed: int, purpose: str, iteration: int) -> np.ndarray:
        """Which real images an iteration looks at: at most `most`, drawn without replacement.

        A class with no more images than the set has of it looks at its start, which is all of it:
        its distance is 0 then, and its images stay what they are.
        """
        if len(self.pixels) <= len(self.start):
            return self.start
        generator = rng(seed, purpose, self.label, iteration)
        return generator.permutation(len(self.pixels))[:most]


@dataclass(frozen=True)
class RealSet:
    """The real images of all classes; `start` int64 [C, IPC]: which the synthetic ones start from.

    `names`: where each real image came from.
    """

    images: Images
    labels: np.ndarray
    names: list[str]
    start: np.ndarray
    size: int
    device: torch.device

    def load(self, label: int) -> RealClass:
        """All images of a class, as whole squares: decoded once, looked at in every iteration."""
        members = np.flatnonzero(self.labels == label)
        pixels = torch.from_numpy(self.decode(members)).to(self.device)
        return RealClass(label, pixels, np.searchsorted(members, self.start[label]))

    def some(self, classes: Sequence[int], most: int, *key: int | str) -> tuple[Tensor, list[int]]:
        """At most `most` images of each class, drawn by `key` and the class: uint8 [n, 3, R, R] on
        the device, class after class, and how many of each. What is held does not grow with the
        set."""
        drawn = []
        for label in classes:
            members = np.flatnonzero(self.labels == label)
            if len(members) > most:
                members = np.sort(rng(*key, label).permutation(members)[:most])
            drawn.append(members)
        pixels = torch.from_numpy(self.decode(np.concatenate(drawn))).to(self.device)
        return pixels, [len(members) for members in drawn]

    def decode(self, members: np.ndarray) -> np.ndarray:
        """The images `members` int [n] as whole squares, uint8 [n, 3, R, R]."""
        plans = [(part, None) for part in np.split(members, range(DECODED, len(members), DECODED))]
        parts = [distilled.to_uint8(x) for x in self.images.stream(plans, ViewSpec(self.size))]
        return np.concatenate(parts)

    def initial(self) -> np.ndarray:
        """What the synthetic images start from, uint8 [C · IPC, 3, R, R], class by class."""
        return self.decode(self.start.reshape(-1))

    def provenance(self, label: int) -> list[dict[str, Any]]:
        return [{"image": int(i), "source": self.names[i]} for i in self.start[label]]


def open_real(
    ipc: int,
    seed: int,
    seen: Seen,
    context: Context,
    looks: Callable[[np.ndarray], int] | None = None,
) -> tuple[Pixels, RealSet]:
    """The real set of the input "shard". Where the images start does not depend on what they
    become: they are the random real images that a student of the same seed is trained on for
    comparison.

    `looks`: from the images of each class, how many this rank would decode; where that is more than
    there are and they fit in memory, they are decoded once and held.
    """
    device = context.ranks.device
    split = ShardSplit(context.input("shard"), "train")
    num_classes = len(split.classes)
    start = chosen.random_real(split.labels, num_classes, ipc, seed).reshape(num_classes, ipc)
    often = looks is not None and looks(split.counts) > len(split)
    opened = open_images if often and fits_memory(split, seen) else stream_images
    images = opened(split, seen, device, context.workers)
    real = RealSet(images, split.labels, split.names, start, seen.resolution, device)
    return Pixels.of(split, device, context.inputs.get("zca")), real
