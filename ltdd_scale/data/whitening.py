"""ZCA whitening: pixels without correlation, each of variance 1, as far as ε lets them.

    z = W (x − m),   W = U (Λ + ε)^(−1/2) Uᵀ,   C = U Λ Uᵀ

m and C are mean and covariance of the training images in [0, 1], the 3·R² numbers of an image taken
as one vector. Of all whitenings this one stays nearest to the images. It takes the place of the
normalisation by channel, as in the released code of MTT, DATM and DAMED (kornia's, ε .1).

The stage "whiten" writes one file, ``zca.npz``: ``mean`` float32 [3, R, R] and ``matrix``, W,
float32 [D, D] with D = 3·R².
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltdd_scale.data import streamed
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.errors import UserError
from ltdd_scale.runtime import files
from ltdd_scale.runtime.context import Context
from ltdd_scale.stage import Cost, Facts, Given

FILE = "zca.npz"
DECODED = 256  # images decoded at once
FLOAT, DOUBLE = 4, 8  # bytes
INVERTED = 8  # matrices of float32 where the inverse is found too, which is done in float64
MATRICES = 10  # of float64 while eigenvectors are found, by a measured peak
EIGEN = 10  # FLOPs of it, in D³
# LAPACK counts its workspace, 2·D² numbers, in 32 bits.
MOST = 32_000


@dataclass(frozen=True)
class Whitening:
    """`mean` float32 [3, R, R] and `matrix` float32 [D, D], symmetric, on one device."""

    mean: Tensor
    matrix: Tensor

    @cached_property
    def inverse(self) -> Tensor:
        """W⁻¹ float32 [D, D]. W is positive definite, and far from singular: see ε."""
        factor = torch.linalg.cholesky(self.matrix.double())
        return torch.cholesky_inverse(factor).float()

    def __call__(self, images: Tensor) -> Tensor:
        """Images float [..., 3, R, R] in [0, 1] → whitened, float32."""
        return self._times(images - self.mean, self.matrix)

    def back(self, whitened: Tensor) -> Tensor:
        """The images that were whitened, whatever their pixels: also such outside of [0, 1]."""
        return self._times(whitened, self.inverse) + self.mean

    def clamp(self, whitened: Tensor) -> None:
        """Back to valid pixels, in place: those outside of [0, 1] move to its edge.

        It is the nearest valid image in pixels, not in whitened ones.
        """
        pixels = self.back(whitened)
        # Only what has to move does: rounding would add up over iterations.
        whitened += self._times(pixels.clamp(0, 1) - pixels, self.matrix)

    def _times(self, images: Tensor, matrix: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            return (images.float().flatten(-3) @ matrix).view_as(images)


def load(path: Path, device: torch.device) -> Whitening:
    """The whitening in the file `path`. Raises `UserError` where it is missing or damaged."""
    again = "delete its folder and run the same command again"
    try:
        # Opened here: numpy leaves a file open that is none of its own.
        with open(path, "rb") as file, np.load(file) as found:
            mean, matrix = found["mean"], found["matrix"]
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {again}") from None
    except OSError as error:
        raise files.kind(error)(f"cannot read {path}: {error.strerror or error}") from None
    except (zipfile.BadZipFile, EOFError, KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); {again}") from None
    if mean.ndim != 3 or matrix.shape != (mean.size, mean.size):
        shapes = f"mean {list(mean.shape)}, matrix {list(matrix.shape)}"
        raise UserError(f"{path} is damaged ({shapes}); {again}")
    return Whitening(torch.from_numpy(mean).to(device), torch.from_numpy(matrix).to(device))


def save(path: Path, whitening: Whitening) -> None:
    """Equal numbers give equal bytes."""
    with files.replacing(path) as f:
        mean, matrix = (x.cpu().numpy() for x in (whitening.mean, whitening.matrix))
        np.savez(f, mean=mean, matrix=matrix)


def fit(pixels: Iterable[Tensor], eps: float, device: torch.device) -> Whitening:
    """The whitening of images uint8 [n, 3, R, R], which come in batches; there are at least two.

    In float64. The covariance is of n − 1.
    """
    images, shape = 0, torch.Size()
    total = products = torch.zeros(0, dtype=torch.float64, device=device)
    for batch in pixels:
        x = batch.to(device).flatten(1).double()
        if not images:
            total, products = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1], x.shape[1])
        # Of whole numbers: these sums are exact, in any order and on any device.
        total += x.sum(0)
        products.addmm_(x.T, x)
        images, shape = images + len(x), batch.shape[1:]
    mean = total / images
    products.addr_(mean, mean, alpha=-images).div_((images - 1) * 255**2)
    matrix = _whitener(products, eps)
    return Whitening((mean / 255).float().view(shape), matrix.float())


def _whitener(covariance: Tensor, eps: float) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    matrix = (vectors * (values.clamp(min=0) + eps).rsqrt()) @ vectors.T
    return (matrix + matrix.T) / 2  # symmetric to the last bit


def run(settings: Given, context: Context) -> dict[str, Any]:
    """Write ``zca.npz``. Raises `UserError` for fewer images than dimensions."""
    split, size = ShardSplit(context.input("shard"), "train"), settings.resolution
    refuse_few(len(split), size)
    every = np.arange(len(split))
    plans = [(part, None) for part in np.split(every, range(DECODED, len(every), DECODED))]
    progress = context.progress("whiten", len(plans), "batches")

    def decoded() -> Iterable[Tensor]:
        for done, (batch, _) in enumerate(
            streamed.decoded(split, plans, size, 0, context.workers), 1
        ):
            yield batch
            progress.update(done)

    save(context.out / FILE, fit(decoded(), settings.zca_eps, context.ranks.device))
    return {"images": len(split), "dimensions": dimensions(size)}


def dimensions(resolution: int) -> int:
    """Numbers of an image."""
    return 3 * resolution**2


def refuse_few(images: int, resolution: int) -> None:
    """Raise `UserError` where `images` cannot span the space that they lie in."""
    size = dimensions(resolution)
    if images < size:
        raise UserError(
            f"data.zca: {images:,} training images do not span the 3·{resolution}² = {size:,} "
            f"dimensions of their pixels: lower data.resolution to {int((images / 3) ** 0.5)}, or "
            "set data.zca=false"
        )


def check(settings: Any) -> None:
    """Raise `UserError` for images that are too large."""
    size = dimensions(settings.resolution)
    if size > MOST:
        raise UserError(
            f"data.zca: images of {settings.resolution} pixels have {size:,} numbers, and no more "
            f"than {MOST:,} can be whitened: lower data.resolution to {int((MOST / 3) ** 0.5)}, or "
            "set data.zca=false"
        )


def cost(settings: Any, facts: Facts) -> Cost:
    """Covariance and eigenvectors, in float64. Asked before anything starts, so it is here that
    too few images are refused."""
    refuse_few(facts.num_images, settings.resolution)
    size = dimensions(settings.resolution)
    return Cost(
        flops=2.0 * facts.num_images * size**2 + EIGEN * float(size) ** 3,
        memory=MATRICES * DOUBLE * float(size) ** 2,
        disk=FLOAT * float(size) ** 2,
    )


def flops(settings: Any, images: float) -> float:
    """FLOPs of whitening `images`, for the costs of a stage that shows images to networks; 0 where
    its settings have no `zca`."""
    if "zca" not in settings:
        return 0.0
    return 2.0 * images * dimensions(settings.images.resolution) ** 2


def held(settings: Any, inverse: bool = False) -> float:
    """Bytes of W in such a stage, at most; with `inverse` also of what turns images back."""
    if "zca" not in settings:
        return 0.0
    matrices = INVERTED if inverse else 1
    return float(matrices) * FLOAT * dimensions(settings.images.resolution) ** 2
