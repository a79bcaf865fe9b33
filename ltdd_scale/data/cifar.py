"""torchvision's download folders of CIFAR-10 and CIFAR-100 (python pickles)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ltdd_scale.data import pickles
from ltdd_scale.data.split import Source, Split, from_arrays
from ltdd_scale.errors import UserError
from ltdd_scale.runtime import files

CURE = "download the set again with torchvision"


@dataclass(frozen=True)
class _Version:
    """A version of CIFAR: its folder and the files in it, and what they call classes and labels."""

    folder: str
    meta: str
    names: str
    labels: str
    train: tuple[str, ...]
    test: str

    @property
    def files(self) -> tuple[str, ...]:
        return (self.meta, *self.train, self.test)


VERSIONS = (
    _Version(
        folder="cifar-10-batches-py",
        meta="batches.meta",
        names="label_names",
        labels="labels",
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test="test_batch",
    ),
    _Version(
        folder="cifar-100-python",
        meta="meta",
        names="fine_label_names",
        labels="fine_labels",
        train=("train",),
        test="test",
    ),
)


def find(root: Path) -> tuple[Path, _Version] | None:
    """The folder of pickles that is `root` or lies in it."""
    for version in VERSIONS:
        if root.name == version.folder:
            return root, version
        if (root / version.folder).is_dir():
            return root / version.folder, version
    return None


def open_all(root: Path, version: _Version) -> Source:
    """Raises `UserError` where a pickle is missing, damaged or not one of CIFAR."""
    (classes,) = _read(root / version.meta, version.names)

    def split(batches: tuple[str, ...]) -> Split:
        parts = [_batch(root / name, version.labels, len(classes)) for name in batches]
        pixels = np.concatenate([data for data, _, _ in parts])
        pixels = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels = np.concatenate([labels for _, labels, _ in parts])
        return from_arrays([name for _, _, names in parts for name in names], labels, pixels)

    return Source(list(classes), split(version.train), split((version.test,)))


def _batch(path: Path, key: str, num_classes: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Pixels uint8 [n, 3072], labels int64 [n] and names of a pickle."""
    data, labels, names = _read(path, "data", key, "filenames")
    labels = np.asarray(labels)
    if getattr(data, "dtype", None) != np.uint8 or data.shape != (labels.size, 3072):
        raise UserError(f"{path} is damaged (its images are not uint8 [n, 3072]): {CURE}")
    fits = labels.dtype.kind in "iu" and labels.ndim == 1 and len(names) == len(labels) > 0
    if not fits or labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(f"{path} is damaged (its names or labels do not fit its images): {CURE}")
    return data, labels, names


def _read(path: Path, *keys: str) -> list[Any]:
    content = pickles.load(path, CURE)
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise UserError(f"{path} is damaged (there is no '{missing[0]}' in it): {CURE}")
    return [content[key] for key in keys]


def digest(root: Path, version: _Version) -> str:
    """Of the pickles' names and content: labels that change leave their length as it is."""
    lines = []
    for path in (root / name for name in version.files):
        if not path.is_file():
            raise UserError(f"{path} is missing: {CURE}")
        try:
            lines.append(f"{path.name}\0{files.sha256(path)}\n")
        except OSError as error:
            raise files.kind(error)(f"cannot read {path}: {error.strerror}") from None
    return hashlib.sha256("".join([version.folder, "\n", *lines]).encode()).hexdigest()
