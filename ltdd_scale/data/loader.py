"""Batches of real images: a plan says which image and which view at each position, a loader only fetches.

Small sets are held decoded in memory and their views are computed a batch at a time; larger ones are decoded as they are needed, by DALI where it
is installed, else by PyTorch's worker processes. All give float images in [0, 1] of the same windows in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from ltdd_scale.config import Config
from ltdd_scale.data import augment, dali, streamed
from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.data.streamed import Plan
from ltdd_scale.errors import UserError
from ltdd_scale.runtime import signals

FEW = 2000  # images that one process decodes sooner than others start


class MemoryImages:
    """Decoded images uint8 [N, 3, R, R] on a device, with int64 labels [N]."""

    def __init__(self, pixels: np.ndarray | torch.Tensor, labels: np.ndarray, device: torch.device):
        self.pixels = torch.as_tensor(pixels).to(device)
        self.labels = np.asarray(labels, np.int64)
        self.sizes = np.full((len(self.labels), 2), self.pixels.shape[-1])
        self.counts = np.bincount(self.labels)

    def stream(self, plans: Iterable[Plan], spec: ViewSpec) -> Iterator[torch.Tensor]:
        """Images of each plan, float [n, 3, R, R] in [0, 1]."""
        for indices, views in plans:
            images = (
                self.pixels[
                    torch.from_numpy(np.asarray(indices, np.int64)).to(self.pixels.device)
                ].float()
                / 255
            )
            yield images if views is None else augment.apply(images, views, spec)


def fits_memory(split: ShardSplit, config: Config) -> bool:
    return len(split) * 3 * config.data.resolution**2 <= config.data.memory_gb * 2**30


def backend(split: ShardSplit, config: Config) -> str:
    """What decodes the images of `split`: "dali" or "torch"."""
    if config.data.loader == "dali" and not dali.is_installed():
        raise UserError(
            "data.loader=dali, but nvidia-dali is not installed: pip install nvidia-dali-cuda130 (it needs no GPU), or --set data.loader=torch"
        )
    wanted = config.data.loader == "dali" or (
        config.data.loader == "auto" and not fits_memory(split, config)
    )
    return "dali" if wanted and dali.is_installed() else "torch"


def stream_images(
    split: ShardSplit, config: Config, device: torch.device
) -> streamed.StreamedImages | dali.DaliImages:
    """Images decoded as they are needed."""
    size, workers = config.data.resolution, config.runtime.workers
    if backend(split, config) == "dali":
        return dali.DaliImages(split, size, device, min(workers, len(os.sched_getaffinity(0))))
    return streamed.StreamedImages(split, size, device, workers)


def decode(split: ShardSplit, resolution: int, workers: int) -> np.ndarray:
    """Every image of a split, whole and centred: uint8 [N, 3, R, R]."""
    pixels = np.empty((len(split), 3, resolution, resolution), np.uint8)
    plans = [(np.arange(i, min(i + 256, len(split))), None) for i in range(0, len(split), 256)]
    batches = streamed.decoded(split, plans, resolution, True, workers if len(split) > FEW else 0)
    for (indices, _), (images, _) in zip(plans, batches, strict=True):
        signals.check()
        pixels[indices] = images.numpy()
    return pixels


def open_images(split: ShardSplit, config: Config, device: torch.device):
    """The loader that fits the set."""
    if fits_memory(split, config):
        return MemoryImages(
            decode(split, config.data.resolution, config.runtime.workers), split.labels, device
        )
    return stream_images(split, config, device)


def normalizer(mean: Sequence[float], std: Sequence[float], device: torch.device):
    """(x − mean) / std per channel for images [n, 3, H, W] in [0, 1]."""
    m = torch.tensor(mean, device=device).view(1, 3, 1, 1)
    s = torch.tensor(std, device=device).view(1, 3, 1, 1)
    return lambda x: (x - m) / s
