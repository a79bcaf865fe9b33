"""Batches of real images: a plan says which image and which view at each position, a loader only
fetches.

Small sets are held decoded in memory and their views are computed a batch at a time; larger ones
are decoded as they are needed, by DALI or by PyTorch's worker processes (`data.backend`). All give
float images in [0, 1] of the same windows in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from ltdd_scale.data import dali, distilled, streamed, whitening
from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.backend import backend, fits_memory
from ltdd_scale.data.images import Images, MemoryImages, Plan
from ltdd_scale.data.settings import Seen
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.runtime import signals

FEW = 2000  # images that one process decodes sooner than others start

Normalize = Callable[[torch.Tensor], torch.Tensor]


def open_images(split: ShardSplit, seen: Seen, device: torch.device, workers: int) -> Images:
    """The images of `split` at `seen.resolution`, held in memory where they fit."""
    if fits_memory(split, seen):
        return MemoryImages(decode(split, seen.resolution, workers), split.labels, device)
    return stream_images(split, seen, device, workers)


def stream_images(split: ShardSplit, seen: Seen, device: torch.device, workers: int) -> Images:
    """Images decoded as they are needed, by `workers` threads (DALI) or processes (PyTorch)."""
    by = backend(split, seen)
    if by != "torch":
        threads = min(workers, len(os.sched_getaffinity(0)))
        return dali.DaliImages(split, seen.resolution, device, threads, on_cpu=by == "dali-cpu")
    return streamed.StreamedImages(split, seen.resolution, device, workers)


def decode(split: ShardSplit, resolution: int, workers: int) -> np.ndarray:
    """Every image of a split, whole and centred: uint8 [N, 3, R, R]."""
    pixels = np.empty((len(split), 3, resolution, resolution), np.uint8)
    plans = [(np.arange(i, min(i + 256, len(split))), None) for i in range(0, len(split), 256)]
    batches = streamed.decoded(split, plans, resolution, 0, workers if len(split) > FEW else 0)
    for (indices, _), (images, _) in zip(plans, batches, strict=True):
        signals.check()
        pixels[indices] = images.numpy()
    return pixels


def some_images(
    split: ShardSplit, indices: np.ndarray, seen: Seen, device: torch.device, workers: int
) -> np.ndarray:
    """Some images of a split, whole and centred, as networks see them: uint8 [n, 3, R, R]."""
    plans: list[Plan] = [(part, None) for part in np.split(indices, range(256, len(indices), 256))]
    shown = stream_images(split, seen, device, workers).stream(plans, ViewSpec(seen.resolution))
    out = np.empty((len(indices), 3, seen.resolution, seen.resolution), np.uint8)
    for k, part in enumerate(shown):
        out[256 * k : 256 * (k + 1)] = distilled.to_uint8(part)
    return out


def normalizer(mean: Sequence[float], std: Sequence[float], device: torch.device) -> Normalize:
    """(x − mean) / std per channel for images [n, 3, H, W] in [0, 1]."""
    m = torch.tensor(mean, device=device).view(1, 3, 1, 1)
    s = torch.tensor(std, device=device).view(1, 3, 1, 1)

    def normalize(x: torch.Tensor) -> torch.Tensor:
        return (x - m) / s

    return normalize


def prepare(split: ShardSplit, device: torch.device, zca: Path | None = None) -> Normalize:
    """The normalisation of the set that `split` is of: by its training images.

    `zca`: the folder of the stage "whiten", where networks see whitened images instead.
    """
    if zca is not None:
        return whitening.load(zca / whitening.FILE, device)
    return normalizer(split.mean, split.std, device)
