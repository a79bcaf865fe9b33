"""Images in named folders, decoded into memory: a distilled set, and what it is tried on."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ltdd_scale.data.folders import images
from ltdd_scale.data.shards import square, upright
from ltdd_scale.errors import UserError


class Named(NamedTuple):
    """`pixels` uint8 [N, 3, R, R], `labels` int64 [N]."""

    pixels: np.ndarray
    labels: np.ndarray


def read_images(folder: Path, names: list[str], resolution: int) -> Named:
    """The images under folder/<name>/, on all cores: centre squares, turned as EXIF says. Raises
    `UserError` for a class without images, and for one that cannot be read."""
    found = find_images(folder, names)
    labels = np.repeat(np.arange(len(names)), [len(paths) for paths in found])
    pixels = np.empty((len(labels), 3, resolution, resolution), np.uint8)

    def put(numbered: tuple[int, Path]) -> None:
        row, path = numbered
        try:
            with Image.open(path) as image:
                shown = np.asarray(square(upright(image), resolution))
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{path}: not an image that can be read ({error})") from None
        pixels[row] = shown.transpose(2, 0, 1)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "read") as pool:
        for _ in pool.map(put, enumerate(path for paths in found for path in paths)):
            pass
    return Named(pixels, labels)


def find_images(folder: Path, names: list[str]) -> list[list[Path]]:
    """The image files under folder/<name>/ of each name, at any depth, sorted; what is hidden is
    none. Raises `UserError` for a class without images."""
    out = []
    for c, name in enumerate(names):
        found = sorted(folder / path for path, _ in images(folder, name))
        if not found:
            raise UserError(f"{folder / name}: no images of class {c} there")
        out.append(found)
    return out
