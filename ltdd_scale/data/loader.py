"""Batches of real images: a plan says which image and which view at each position, a loader only fetches.

Small sets are held decoded in memory and their views are computed a batch at a time; larger ones are decoded by worker
processes from memory-mapped shards. Both give float images in [0, 1] of the same windows.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ltdd_scale.data import augment
from ltdd_scale.data.augment import Views, ViewSpec
from ltdd_scale.data.shards import ShardSplit, square
from ltdd_scale.errors import UserError

Plan = tuple[np.ndarray, Views | None]  # image indices and their views; no views: the whole image, centred


def decode(split: ShardSplit, resolution: int) -> np.ndarray:
    """Every image of a split, whole and centred: uint8 [N, 3, R, R]."""
    pixels = np.empty((len(split), 3, resolution, resolution), np.uint8)
    for i in range(len(split)):
        pixels[i] = np.asarray(square(split.image(i), resolution)).transpose(2, 0, 1)
    return pixels


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
            images = self.pixels[torch.from_numpy(np.asarray(indices, np.int64)).to(self.pixels.device)].float() / 255
            yield images if views is None else augment.apply(images, views, spec)


class _Decoding(Dataset):
    """Item k is the whole batch of plan k: uint8 [n, 3, R, R]."""

    def __init__(self, split: ShardSplit, plans: Sequence[Plan], resolution: int, whole: bool):
        self.split, self.plans, self.resolution, self.whole = split, plans, resolution, whole

    def __len__(self) -> int:
        return len(self.plans)

    def __getitem__(self, k: int) -> torch.Tensor:
        indices, views = self.plans[k]
        r = self.resolution
        out = np.empty((len(indices), 3, r, r), np.uint8)
        for j, i in enumerate(indices):
            if views is None or self.whole:
                image = square(self.split.image(int(i)), r)
            else:
                image = decode_window(self.split.encoded(int(i)), views.windows[j], r)
            out[j] = np.asarray(image).transpose(2, 0, 1)
        return torch.from_numpy(out)


def decode_window(content: bytes, window: np.ndarray, size: int) -> Image.Image:
    """A window (top, left, height, width as fractions) of an encoded image at size × size, decoding no finer than needed."""
    image = Image.open(io.BytesIO(content))
    top, left, h, w = np.clip(window, 0, 1)
    image.draft("RGB", (int(size / w), int(size / h)))
    image = image.convert("RGB")
    box = (left * image.width, top * image.height, min((left + w), 1.0) * image.width, min((top + h), 1.0) * image.height)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def _quiet_worker(_: int) -> None:
    import signal

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer


def _said_plainly(loader: DataLoader) -> Iterator[torch.Tensor]:
    """The loader's batches; a worker's `UserError` without the worker's traceback around it."""
    try:
        yield from loader
    except UserError as error:
        raise UserError(str(error).strip().splitlines()[-1].rpartition("UserError: ")[2]) from error


class StreamedImages:
    """A split decoded as it is needed, by `workers` processes."""

    def __init__(self, split: ShardSplit, resolution: int, device: torch.device, workers: int):
        self.split, self.resolution, self.device, self.workers = split, resolution, device, workers
        self.sizes, self.labels, self.counts = split.sizes, split.labels, split.counts

    def stream(self, plans: Iterable[Plan], spec: ViewSpec) -> Iterator[torch.Tensor]:
        """Images of each plan, float [n, 3, R, R] in [0, 1], in the plans' order."""
        plans = list(plans)
        loader = DataLoader(
            _Decoding(self.split, plans, self.resolution, whole=spec.crop_scale is None),
            batch_size=None,
            num_workers=max(0, min(self.workers, len(plans) - 1)),  # one batch is not worth a process
            worker_init_fn=_quiet_worker,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # its own: the loader must not draw from the global one
        )
        whole = np.float32([0, 0, 1, 1])
        for (indices, views), images in zip(plans, _said_plainly(loader), strict=True):
            images = images.to(self.device, non_blocking=True).float() / 255
            if views is not None:  # a crop is done by now, a shift is not, nor are mirroring and colours
                windows = views.windows if spec.crop_scale is None else np.tile(whole, (len(indices), 1))
                rest = Views(windows, views.mirrored, views.ops, views.signs)
                images = augment.apply(images, rest, spec)
            yield images


def open_images(split: ShardSplit, resolution: int, device: torch.device, memory_gb: float, workers: int) -> MemoryImages | StreamedImages:
    """The loader that fits the set."""
    if len(split) * 3 * resolution**2 <= memory_gb * 2**30:
        return MemoryImages(decode(split, resolution), split.labels, device)
    return StreamedImages(split, resolution, device, workers)


def normalizer(mean: Sequence[float], std: Sequence[float], device: torch.device):
    """(x − mean) / std per channel for images [n, 3, H, W] in [0, 1]."""
    m = torch.tensor(mean, device=device).view(1, 3, 1, 1)
    s = torch.tensor(std, device=device).view(1, 3, 1, 1)
    return lambda x: (x - m) / s
