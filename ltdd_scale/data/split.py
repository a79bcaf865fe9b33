"""What a source gives: the splits of a set as names, labels and a reader of encoded bytes."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

IMAGE_NAMES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")


@dataclass
class Split:
    """Image `i` has the name `names[i]` and the class `labels[i]`; `read(i)` are its bytes."""

    names: list[str]
    labels: np.ndarray
    read: Callable[[int], bytes]

    def take(self, chosen: np.ndarray) -> Split:
        read = self.read
        return Split(
            [self.names[i] for i in chosen], self.labels[chosen], lambda k: read(int(chosen[k]))
        )

    def part(self, chosen: np.ndarray) -> tuple[Split, Split]:
        """(the rest, the images `chosen`), each in order."""
        rest = np.setdiff1d(np.arange(len(self.names)), chosen)
        return self.take(rest), self.take(np.sort(chosen))


@dataclass
class Source:
    """The splits of a set, and its class names in label order."""

    classes: list[str]
    train: Split
    test: Split
    val: Split | None = None
    notes: dict[str, str] = field(default_factory=dict)


class Available(NamedTuple):
    """Training images of each class, test images, and whether there is a validation split."""

    train: list[int]
    test: int
    validated: bool


def from_files(
    root: Path, names: list[str], labels: Sequence[int], where: Sequence[str] | None = None
) -> Split:
    """Images that lie in files under `root`, under their names or under those of `where`."""
    where = names if where is None else where
    return Split(names, np.asarray(labels, np.int64), lambda i: (root / where[i]).read_bytes())


def from_arrays(names: list[str], labels: Sequence[int] | np.ndarray, pixels: np.ndarray) -> Split:
    """Images uint8 [N, H, W] or [N, H, W, 3], encoded as PNG when they are asked for."""

    def read(i: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels[i]).save(buffer, "PNG")
        return buffer.getvalue()

    return Split(names, np.asarray(labels, np.int64), read)
