"""Differentiable Siamese augmentation (DSA, ICML 2021): one random change for a whole batch.

Matching methods compare real with synthetic images. Both batches are changed in the same way: the
draw is a record of its own, and applying it knows no randomness.

    draw = siamese.draw(rng(seed, "dsa", t), siamese.choices("crop_flip"), 32)
    real, synthetic = siamese.apply(real, draw), siamese.apply(synthetic, draw)

Training draws one kind of change for a batch too, but the parameters of each image for itself:

    draw = siamese.draw_each(rng(seed, "dsa", t), siamese.choices("crop_flip"), 32, len(images))

No `grid_sample`: its gradient on a GPU adds in no fixed order. What moves pixels is a product with
resampling matrices, or a shear whose gradient is another shear.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
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
    """One change with its parameters: the same for every image, or one row of them an image.

    color: brightness, saturation, contrast. crop: shift down and right. cutout: middle, down and
    right. flip: 1 or 0. scale: shown height and width. rotate: degrees, counter-clockwise. Lengths
    are fractions of the side. none: images are left as they are.
    """

    kind: str
    values: tuple[float, ...] | tuple[tuple[float, ...], ...] = ()

    def rows(self) -> np.ndarray:
        """The parameters float64 [n, k], an image a row; [1, k] where all images share them."""
        return np.atleast_2d(np.asarray(self.values, np.float64))


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
    one = draw_each(rng, strategy, size, 1)
    return Draw(one.kind, tuple(one.rows()[0].tolist())) if one.values else one


def draw_each(rng: np.random.Generator, strategy: tuple[str, ...], size: int, n: int) -> Draw:
    """One of `strategy`, with parameters of their own for each of `n` images."""
    if not strategy:
        return Draw("none")
    kind = strategy[int(rng.integers(len(strategy)))]
    match kind:
        case "color":
            low, high = zip((-BRIGHTNESS, BRIGHTNESS), SATURATION, CONTRAST, strict=True)
            values = rng.uniform(low, high, (n, 3))
        case "crop":
            most = round(SHIFT * size)
            values = rng.integers(-most, most + 1, (n, 2)) / size
        case "cutout":
            values = rng.integers(0, size + 1, (n, 2)) / size
        case "flip":
            values = (rng.random((n, 1)) < 0.5).astype(float)
        case "scale":
            values = rng.uniform(1 / SCALE, SCALE, (n, 2))
        case _:
            values = rng.uniform(-ROTATE, ROTATE, (n, 1))
    return Draw(kind, tuple(map(tuple, values.tolist())))


def apply(images: Tensor, draw: Draw) -> Tensor:
    """`images` float [n, 3, R, R], normalised → the same shape, differentiable.

    What comes from outside of an image is 0: the mean colour. Raises `ValueError` for the
    parameters of another number of images.
    """
    if draw.kind == "none":
        return images
    rows, size = draw.rows(), images.shape[-1]
    if len(rows) not in (1, len(images)):
        raise ValueError(f"a draw for {len(rows)} images, and there are {len(images)}")
    match draw.kind:
        case "color":
            return _color(images, _on(images, rows))
        case "crop":
            return _window(images, np.hstack([rows, np.ones_like(rows)]))
        case "cutout":
            return _cutout(images, _on(images, rows * size))
        case "flip":
            return torch.where(_on(images, rows)[:, :, None, None] > 0, images.flip(3), images)
        case "scale":
            return _window(images, np.hstack([(1 - rows) / 2, rows]))
        case _:
            return rotate(images, rows[:, 0])


def _on(images: Tensor, rows: np.ndarray) -> Tensor:
    """Numbers [n, k] as float32 beside the images. Nobody waits for them."""
    return torch.from_numpy(rows.astype(np.float32)).to(images.device, non_blocking=True)


def _color(images: Tensor, rows: Tensor) -> Tensor:
    brightness, saturation, contrast = rows[:, :, None, None, None].unbind(1)
    images = images + brightness
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * saturation + grey
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * contrast + mean


def _cutout(images: Tensor, middles: Tensor) -> Tensor:
    """0 in a square about `middles` [n, 2], in pixels down and right."""
    size = images.shape[-1]
    half = round(CUTOUT * size) / 2
    at = torch.arange(size, device=images.device) + 0.5
    rows, columns = ((at - middle[:, None]).abs() < half for middle in middles.unbind(1))
    return images * ~(rows[:, None, :, None] & columns[:, None, None, :])


def _window(images: Tensor, windows: np.ndarray) -> Tensor:
    """What is seen through `windows` [n, 4] (top, left, height, width), resized to the image's
    side."""
    mirrored = torch.zeros(len(windows), dtype=torch.bool, device=images.device)
    return augment.crop_resize(images, _on(images, windows), mirrored, images.shape[-1])


def rotate(images: Tensor, degrees: float | np.ndarray) -> Tensor:
    """`images` [n, 3, R, R] turned counter-clockwise about their middle, less than 90 degrees:
    all by the same angle, or each by its own, [n].

    Three shears, along rows, columns and rows: R(θ) = X(−tan θ/2) · Y(sin θ) · X(−tan θ/2). Between
    the first and the last the image is wider, so that nothing is cut that comes back.
    """
    size, angles = images.shape[-1], np.radians(np.atleast_1d(degrees))
    slopes = np.stack([-np.tan(angles / 2), np.sin(angles)], 1)
    wide = size + 2 * math.ceil(np.abs(slopes[:, 0]).max() * size / 2)
    along_rows, along_columns = _on(images, slopes).unbind(1)
    x = _Shear.apply(images.float(), along_rows, wide)
    x = _Shear.apply(x.transpose(2, 3), along_columns, size).transpose(2, 3)
    return _Shear.apply(x, along_rows, size)


class _Shear(torch.autograd.Function):
    """Images [n, C, H, W] whose row y, from the middle, is read at slope · y further right: linear
    interpolation, 0 outside → [n, C, H, `width`]. `slopes` [n], or [1] for all.

    Transposed, a shift by s is the shift by −s: the gradient is a shear itself, and reads pixels
    instead of adding to them.
    """

    @staticmethod
    def forward(images: Tensor, slopes: Tensor, width: int) -> Tensor:
        n, channels, height, source = images.shape
        device = images.device
        y = torch.arange(height, device=device, dtype=torch.float32) - (height - 1) / 2
        shift = slopes[:, None, None, None] * y[:, None]
        whole = shift.floor()
        share = shift - whole  # of the right one of two neighbours
        to = torch.arange(width, device=device) + (source - width) // 2
        at = whole.long() + to + 1  # in images with a border of 0
        padded = F.pad(images, (1, 1))

        def read(at: Tensor) -> Tensor:
            return padded.gather(3, at.clamp(0, source + 1).expand(n, channels, -1, -1))

        return read(at) * (1 - share) + read(at + 1) * share

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        images, slopes, _ = inputs
        ctx.save_for_backward(slopes)
        ctx.width = images.shape[-1]

    @staticmethod
    def backward(ctx, grad: Tensor) -> Any:  # ty: ignore[incompatible-method-override]
        return _Shear.apply(grad, -ctx.saved_tensors[0], ctx.width), None, None
