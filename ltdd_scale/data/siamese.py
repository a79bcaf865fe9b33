"""Differentiable Siamese augmentation (DSA, ICML 2021): one random change for a whole batch.

Matching methods compare real with synthetic images. Both batches are changed in the same way: the
draw is a record of its own, and applying it knows no randomness.

    draw = siamese.draw(rng(seed, "dsa", t), siamese.choices("crop_flip"), 32)
    real, synthetic = siamese.apply(real, draw), siamese.apply(synthetic, draw)

No `grid_sample`: its gradient on a GPU adds in no fixed order. All that moves pixels is a product
with resampling matrices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ltdd_scale.data import augment
from ltdd_scale.errors import UserError

KINDS = ("color", "crop", "cutout", "flip", "scale", "rotate")
ALL = "_".join(KINDS)

BRIGHTNESS = 0.5  # added, at most, in units of normalised pixels
SATURATION = (0.0, 2.0)  # factor of the distance from grey
CONTRAST = (0.5, 1.5)  # factor of the distance from the image's mean
SHIFT = 1 / 8  # of the side, at most
CUTOUT = 1 / 2  # side of the square, of the image's
SCALE = 1.2  # factor of each side, or its inverse, at most
ROTATE = 15.0  # degrees, at most


@dataclass(frozen=True)
class Draw:
    """One change with its parameters, the same for every image that it is applied to.

    color: brightness, saturation, contrast. crop: shift down and right. cutout: middle, down and
    right. flip: 1 or 0. scale: shown height and width. rotate: degrees, counter-clockwise. Lengths
    are fractions of the side. none: images are left as they are.
    """

    kind: str
    values: tuple[float, ...] = ()


def choices(strategy: str, mirror: bool = True) -> tuple[str, ...]:
    """The changes of a strategy such as ``color_crop_flip``; without `mirror` no flip.

    Raises `UserError` for a change that there is not.
    """
    named = tuple(strategy.split("_")) if strategy else ()
    for name in named:
        if name not in KINDS:
            raise UserError(f"augmentation {strategy!r}: {name!r} is none of {', '.join(KINDS)}")
    return tuple(name for name in named if mirror or name != "flip")


def draw(rng: np.random.Generator, strategy: tuple[str, ...], size: int) -> Draw:
    """One of `strategy`, each as likely, for images of `size` pixels a side."""
    if not strategy:
        return Draw("none")
    kind = strategy[int(rng.integers(len(strategy)))]
    match kind:
        case "color":
            low, high = zip((-BRIGHTNESS, BRIGHTNESS), SATURATION, CONTRAST, strict=True)
            values = rng.uniform(low, high)
        case "crop":
            most = round(SHIFT * size)
            values = rng.integers(-most, most + 1, 2) / size
        case "cutout":
            values = rng.integers(0, size + 1, 2) / size
        case "flip":
            values = (float(rng.random() < 0.5),)
        case "scale":
            values = rng.uniform(1 / SCALE, SCALE, 2)
        case _:
            values = (rng.uniform(-ROTATE, ROTATE),)
    return Draw(kind, tuple(float(v) for v in values))


def apply(images: Tensor, draw: Draw) -> Tensor:
    """`images` float [n, 3, R, R], normalised → the same shape, differentiable.

    What comes from outside of an image is 0: the mean colour.
    """
    match draw.kind:
        case "none":
            return images
        case "color":
            return _color(images, *draw.values)
        case "crop":
            down, right = draw.values
            return _window(images, (down, right, 1.0, 1.0))
        case "cutout":
            return _cutout(images, *draw.values)
        case "flip":
            return images.flip(3) if draw.values[0] else images
        case "scale":
            height, width = draw.values
            return _window(images, ((1 - height) / 2, (1 - width) / 2, height, width))
        case _:
            return rotate(images, draw.values[0])


def _color(images: Tensor, brightness: float, saturation: float, contrast: float) -> Tensor:
    images = images + brightness
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * saturation + grey
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * contrast + mean


def _cutout(images: Tensor, down: float, right: float) -> Tensor:
    size = images.shape[-1]
    half = round(CUTOUT * size) / 2
    at = torch.arange(size, device=images.device) + 0.5
    rows, columns = ((at - middle * size).abs() < half for middle in (down, right))
    return images * ~(rows[:, None] & columns[None, :])


def _window(images: Tensor, window: tuple[float, float, float, float]) -> Tensor:
    """What is seen through `window` (top, left, height, width), resized to the image's side."""
    n, device = len(images), images.device
    windows = torch.tensor([window], dtype=torch.float32, device=device).expand(n, -1)
    mirrored = torch.zeros(n, dtype=torch.bool, device=device)
    return augment.crop_resize(images, windows, mirrored, images.shape[-1])


def rotate(images: Tensor, degrees: float) -> Tensor:
    """`images` [n, 3, R, R] turned counter-clockwise about their middle, less than 90 degrees.

    Three shears, along rows, columns and rows: R(θ) = X(−tan θ/2) · Y(sin θ) · X(−tan θ/2). Between
    the first and the last the image is wider, so that nothing is cut that comes back.
    """
    size, angle = images.shape[-1], math.radians(degrees)
    slope = math.tan(angle / 2)
    border = math.ceil(abs(slope) * size / 2)
    wide = size + 2 * border
    device = images.device
    along_rows = _shear(size, size, wide, -slope, device)
    along_columns = _shear(wide, size, size, math.sin(angle), device)
    back = _shear(size, wide, size, -slope, device)
    with torch.autocast(device.type, enabled=False):
        x = _each_row(images.float(), along_rows)
        x = _each_row(x.transpose(2, 3), along_columns).transpose(2, 3)
        return _each_row(x, back)


def _shear(lines: int, source: int, target: int, slope: float, device: torch.device) -> Tensor:
    """Matrices [lines, target, source] that move line y by −slope · y, y from the middle: linear
    interpolation, 0 outside of the source."""
    y = torch.arange(lines, device=device, dtype=torch.float32) - (lines - 1) / 2
    to = torch.arange(target, device=device, dtype=torch.float32) - (target - 1) / 2
    at = to[None, :] + slope * y[:, None] + (source - 1) / 2
    pixels = torch.arange(source, device=device, dtype=torch.float32)
    return (1 - (pixels - at[:, :, None]).abs()).clamp(min=0)


def _each_row(images: Tensor, matrices: Tensor) -> Tensor:
    """Row h of images [n, C, H, W] times its own matrix of [H, V, W] → [n, C, H, V]."""
    n, channels, height, width = images.shape
    rows = images.permute(2, 0, 1, 3).reshape(height, n * channels, width)
    moved = rows @ matrices.transpose(1, 2)
    return moved.reshape(height, n, channels, -1).permute(1, 2, 0, 3)
