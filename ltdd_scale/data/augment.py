"""Views of images: drawn first (NumPy, counter-based), applied later (torch, whole batches,
differentiable, deterministic)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

NUM_OPS = 14  # of RandAugment, as torchvision lists them


@dataclass
class Views:
    """Draws for n images: windows float32 [n, 4] (top, left, height, width as fractions of the
    image), mirrored bool [n], ops int [n, k] with signs bool [n, k]."""

    windows: np.ndarray
    mirrored: np.ndarray
    ops: np.ndarray
    signs: np.ndarray

    def __getitem__(self, which) -> Views:
        return Views(self.windows[which], self.mirrored[which], self.ops[which], self.signs[which])

    @classmethod
    def woven(cls, copies: Sequence[Views]) -> Views:
        """Several views of each of n images: the first image's, then the second's, and so on."""
        n = sum(len(v.windows) for v in copies)
        drawn = zip(*((v.windows, v.mirrored, v.ops, v.signs) for v in copies), strict=True)
        return cls(*(np.stack(x, 1).reshape(n, *x[0].shape[1:]) for x in drawn))


@dataclass
class ViewSpec:
    """What is drawn: a RandomResizedCrop of area `crop_scale` (or a shift by up to `padding` of
    `resolution` pixels), a mirror image, `randaugment` operations of `magnitude`/30. Areas from 1
    to 1 are whole images: the centre squares of those that are not square, as networks see them."""

    resolution: int
    crop_scale: tuple[float, float] | None = None
    padding: int = 0
    mirror: bool = True
    randaugment: int = 0
    magnitude: int = 9

    def draw(self, rng: np.random.Generator, sizes: np.ndarray) -> Views:
        """Views of images of `sizes` int [n, 2] (width, height)."""
        n = len(sizes)
        if self.crop_scale is not None:
            windows = _crop_windows(rng, sizes, self.crop_scale)
            # No window of all the area fits an image that is not square.
            if min(self.crop_scale) == 1.0:
                windows = centre_windows(sizes)
        else:
            windows = np.tile(np.array([0, 0, 1, 1], np.float32), (n, 1))
            windows[:, :2] = rng.integers(-self.padding, self.padding + 1, (n, 2)) / self.resolution
        mirrored = rng.random(n) < 0.5 if self.mirror else np.zeros(n, bool)
        ops = rng.integers(0, NUM_OPS, (n, self.randaugment))
        return Views(windows, mirrored, ops, rng.random((n, self.randaugment)) < 0.5)


def _crop_windows(
    rng: np.random.Generator,
    sizes: np.ndarray,
    scale: tuple[float, float],
    ratio=(3 / 4, 4 / 3),
    tries: int = 10,
) -> np.ndarray:
    """torchvision's RandomResizedCrop, for all images at once: the first of `tries` windows that
    fits, else the largest centred one."""
    n = len(sizes)
    width, height = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)
    area = rng.uniform(*scale, (n, tries)) * width * height
    aspect = np.exp(rng.uniform(np.log(ratio[0]), np.log(ratio[1]), (n, tries)))
    w, h = np.sqrt(area * aspect), np.sqrt(area / aspect)
    fits = (w <= width) & (h <= height)
    first = fits.argmax(1)
    rows = np.arange(n)
    w, h, ok = w[rows, first], h[rows, first], fits[rows, first]
    width, height = width[:, 0], height[:, 0]
    r = np.clip(width / height, *ratio)
    w = np.where(ok, w, np.minimum(width, height * r))
    h = np.where(ok, h, np.minimum(height, width / r))
    place = np.where(ok[:, None], rng.random((n, 2)), 0.5)
    top, left = place[:, 0] * (height - h), place[:, 1] * (width - w)
    return np.stack([top / height, left / width, h / height, w / width], 1).astype(np.float32)


def pixel_boxes(windows: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Windows as whole pixels of the encoded images, int32 [n, 4] (top, left, height, width), at
    least one pixel and inside the image.

    Decoders cut at pixels: every backend that decodes cuts at these.
    """
    full = sizes[:, ::-1]
    low = np.clip(np.round(windows[:, :2] * full), 0, full - 1)
    high = np.clip(np.round((windows[:, :2] + windows[:, 2:]) * full), low + 1, full)
    return np.concatenate([low, high - low], 1).astype(np.int32)


def centre_boxes(sizes: np.ndarray) -> np.ndarray:
    """The centre squares of images of `sizes` (width, height), as `pixel_boxes` gives windows."""
    short = sizes.min(1, keepdims=True)
    return np.concatenate([(sizes[:, ::-1] - short) // 2, short, short], 1).astype(np.int32)


def centre_windows(sizes: np.ndarray) -> np.ndarray:
    """The centre squares as windows, float32 [n, 4]: shares of the images."""
    full = np.tile(sizes[:, ::-1], 2)
    return (centre_boxes(sizes) / full).astype(np.float32)


def hulls(boxes: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The smallest box around each run of boxes int32 [n, 4] (top, left, height, width). Runs
    begin at `starts`, int [m]; returns int32 [m, 4]."""
    low = np.minimum.reduceat(boxes[:, :2], starts)
    high = np.maximum.reduceat(boxes[:, :2] + boxes[:, 2:], starts)
    return np.concatenate([low, high - low], 1)


def _resampling(start: torch.Tensor, extent: torch.Tensor, source: int, size: int) -> torch.Tensor:
    """Matrices [n, size, source] that resample [start, start + extent) of `source` pixels to
    `size`: bilinear, widened to the step where it shrinks (as Pillow does). Rows wholly outside the
    image are 0."""
    at = torch.arange(size, device=start.device, dtype=torch.float32)
    centre = (start[:, None] + (at + 0.5) / size * extent[:, None]) * source - 0.5
    step = (extent * source / size).clamp(min=1.0)[:, None, None]
    pixels = torch.arange(source, device=start.device, dtype=torch.float32)
    weight = (1 - (pixels - centre[:, :, None]).abs() / step).clamp(min=0)
    total = weight.sum(2, keepdim=True)
    return weight / torch.where(total > 0, total, torch.ones_like(total))


def crop_resize(
    images: torch.Tensor, windows: torch.Tensor, mirrored: torch.Tensor, size: int
) -> torch.Tensor:
    """Crops of images float [n, C, H, W] resized to [n, C, size, size], some mirrored.

    Written as two small matrix products an image rather than `grid_sample`, whose gradient on a GPU
    adds in no fixed order.
    """
    rows = _resampling(windows[:, 0], windows[:, 2], images.shape[2], size)
    columns = _resampling(windows[:, 1], windows[:, 3], images.shape[3], size)
    columns = torch.where(mirrored[:, None, None], columns.flip(1), columns)
    with torch.autocast(images.device.type, enabled=False):
        return rows[:, None] @ images.float() @ columns.transpose(1, 2)[:, None]


def _apply_op(images: torch.Tensor, op: int, sign: bool, magnitude: int) -> torch.Tensor:
    """One RandAugment operation on float images in [0, 1], scaled as torchvision does."""
    # A second of every process's start: only where it is needed.
    from torchvision.transforms.v2 import functional as tvf

    m, s = magnitude / 30, -1.0 if sign else 1.0
    match op:
        case 0:
            return images
        case 1 | 2 | 3 | 4 | 5:
            at, inside = _pixels_of(op, sign, magnitude, images.shape[3], images.device)
            flat = images.flatten(2)
            return torch.where(inside, flat.gather(2, at.expand_as(flat)), 0).view_as(images)
        case 6 | 7 | 8:
            adjust = (tvf.adjust_brightness, tvf.adjust_saturation, tvf.adjust_contrast)[op - 6]
            return adjust(images, 1 + s * 0.9 * m)
        case 9:
            return _sharpened(images, 1 + s * 0.9 * m)
        case 10:
            levels = 2.0 ** (8 - round(4 * m))
            return (images * levels).floor().clamp(max=levels - 1) / levels
        case 11:
            return tvf.solarize(images, 1 - m)
        case 12:
            return tvf.autocontrast(images)
        case _:
            return tvf.equalize(images)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what stays may meet gradients later
def _pixels_of(
    op: int, sign: bool, magnitude: int, size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which pixel each one of a moved image [`size`, `size`] shows: int64 [size²], and whether
    there is one, bool [size²].

    torchvision moves images to the nearest pixel: what it makes of the pixels' numbers says where
    each one comes from. It makes small tensors on the device of its images, which waits for a GPU,
    so it is asked once, on the CPU.
    """
    from torchvision.transforms.v2 import functional as tvf

    m, s = magnitude / 30, -1.0 if sign else 1.0
    # From 1, as 0 is outside. Whole numbers are exact in float32 up to 4096² pixels.
    numbers = torch.arange(1, size**2 + 1, dtype=torch.float32).view(1, 1, size, size)

    def affine(translate: tuple[int, int] = (0, 0), shear: tuple[float, float] = (0.0, 0.0)):
        corner = [0.0, 0.0] if any(shear) else None
        return tvf.affine(numbers, 0.0, list(translate), 1.0, list(shear), center=corner)

    match op:
        case 1:
            moved = affine(shear=(s * np.degrees(np.arctan(0.3 * m)), 0.0))
        case 2:
            moved = affine(shear=(0.0, s * np.degrees(np.arctan(0.3 * m))))
        case 3:
            moved = affine(translate=(int(s * m * 150 / 331 * size), 0))
        case 4:
            moved = affine(translate=(0, int(s * m * 150 / 331 * size)))
        case _:
            moved = tvf.rotate(numbers, s * 30 * m)
    at = moved.flatten().long() - 1
    inside = at >= 0
    return at.clamp(min=0).to(device, non_blocking=True), inside.to(device, non_blocking=True)


def _sharpened(images: torch.Tensor, factor: float) -> torch.Tensor:
    """torchvision's `adjust_sharpness`, which makes its kernel on the CPU and waits for a GPU."""
    if min(images.shape[2:]) <= 2:
        return images
    kernel = torch.full((3, 3), 1.0 / 13.0, device=images.device)
    kernel[1, 1] = 5.0 / 13.0
    out = images.clone()
    smooth = F.conv2d(out, kernel.expand(images.shape[1], 1, 3, 3), groups=images.shape[1])
    inner = out[..., 1:-1, 1:-1]
    inner.add_(smooth.sub_(inner), alpha=1.0 - factor)
    return out.clamp_(0, 1)


def apply(images: torch.Tensor, views: Views, spec: ViewSpec) -> torch.Tensor:
    """Views of float images in [0, 1], [n, 3, H, W] → [n, 3, resolution, resolution], still in
    [0, 1]."""
    device = images.device
    windows = torch.from_numpy(views.windows).to(device, non_blocking=True)
    mirrored = torch.from_numpy(views.mirrored).to(device, non_blocking=True)
    return apply_ops(crop_resize(images, windows, mirrored, spec.resolution), views, spec)


def apply_ops(images: torch.Tensor, views: Views, spec: ViewSpec) -> torch.Tensor:
    """The RandAugment operations of `views` alone, on float images in [0, 1]."""
    for k in range(views.ops.shape[1]):
        pairs = views.ops[:, k] * 2 + views.signs[:, k]
        kinds, counts = np.unique(pairs, return_counts=True)
        # Images that share an operation side by side, and back. On a GPU it takes far fewer kernels
        # than to write those of each operation to their places.
        there = np.argsort(pairs, kind="stable")
        moves = torch.from_numpy(np.stack([there, np.argsort(there)]))
        moves = moves.to(images.device, non_blocking=True)
        parts = []
        for part, pair in zip(images[moves[0]].split(counts.tolist()), kinds, strict=True):
            op, sign = divmod(int(pair), 2)
            if op:
                part = _apply_op(part, op, bool(sign), spec.magnitude).clamp(0, 1)
            parts.append(part)
        images = torch.cat(parts)[moves[1]]
    return images


def cutmix_boxes(rng: np.random.Generator, n: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes int [n, 4] (top, left, bottom, right) with λ ~ Beta(1, 1), and λ as the share of each
    image that stays outside of its box, float32 [n]."""
    side = np.sqrt(1 - rng.random(n)) * size
    centre = rng.random((n, 2)) * size
    low = np.clip(centre - side[:, None] / 2, 0, size).astype(np.int64)
    high = np.clip(centre + side[:, None] / 2, 0, size).astype(np.int64)
    boxes = np.concatenate([low, high], 1)
    lam = 1 - (high - low).prod(1) / size**2
    return boxes, lam.astype(np.float32)


def paste(images: torch.Tensor, others: torch.Tensor, boxes: np.ndarray) -> torch.Tensor:
    """CutMix: `others` shown inside the boxes int [n, 4], `images` outside."""
    b = torch.from_numpy(boxes).to(images.device, non_blocking=True)[:, :, None]
    at = torch.arange(images.shape[-1], device=images.device)
    rows = (at >= b[:, 0]) & (at < b[:, 2])
    columns = (at >= b[:, 1]) & (at < b[:, 3])
    return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], others, images)
