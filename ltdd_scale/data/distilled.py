"""The one format of a distilled set between stages: write it, open it, say what is wrong with it.

In a stage's folder: ``00000.npy`` a class, uint8 [n, 3, R, R]; ``00000.json``, where each of the
class's images comes from; optional ``labels.npy``, learned logits float32 [N, C]; optional
``hints.json`` for the student, such as a learned rate.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ltdd_scale.data import augment
from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.images import Images, MemoryImages, Plan
from ltdd_scale.errors import UserError
from ltdd_scale.runtime import files
from ltdd_scale.runtime.ahead import ahead

AHEAD = 2  # batches read ahead of the one that is looked at
AGAIN = "delete its folder and run the stage again"


def class_file(folder: Path, label: int) -> Path:
    return folder / f"{label:05d}.npy"


def provenance_file(folder: Path, label: int) -> Path:
    return folder / f"{label:05d}.json"


def learned_file(folder: Path) -> Path:
    return folder / "labels.npy"


def hints_file(folder: Path) -> Path:
    return folder / "hints.json"


def save(path: Path, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array)
    files.write_bytes(path, buffer.getvalue())


def load(path: Path) -> np.ndarray:
    """The array in `path`, in memory. Raises `UserError` where it is missing or damaged."""
    try:
        return np.load(path)
    except OSError as error:
        raise files.kind(error)(f"cannot read {path}: {error.strerror}") from None
    except (EOFError, ValueError) as error:
        raise UserError(f"{path}: {error}; {AGAIN}") from None


def write_class(
    folder: Path, label: int, pixels: np.ndarray, provenance: list[dict[str, Any]] | None = None
) -> None:
    """Write a class's images, uint8 [n, 3, R, R], then a row of provenance for each."""
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"expected uint8 [n, 3, R, R], got {pixels.dtype} {pixels.shape}")
    if provenance is not None and len(provenance) != len(pixels):
        raise ValueError(f"{len(provenance)} rows of provenance for {len(pixels)} images")
    save(class_file(folder, label), pixels)
    if provenance is not None:
        files.write_json(provenance_file(folder, label), provenance)


def write_learned(folder: Path, logits: np.ndarray) -> None:
    """Write learned label logits, [N, C] in the order of `Distilled.labels`."""
    save(learned_file(folder), np.asarray(logits, np.float32))


def write_hints(folder: Path, hints: dict[str, Any]) -> None:
    files.write_json(hints_file(folder), hints)


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """Images in [0, 1] as uint8."""
    return (x.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


class Distilled:
    """A distilled set in a folder, memory-mapped.

    `image_counts` are the images of each class, `labels` int64 [N] their classes, class by class,
    `resolution` their side in pixels. Raises `UserError` that names the file and what is wrong with
    it: one that is missing, of another type or shape, or of more classes than `num_classes`.
    """

    def __init__(self, folder: Path, num_classes: int):
        self.folder, self.num_classes = Path(folder), num_classes
        sides: dict[int, int] = {}
        self.image_counts: list[int] = []
        for label in range(num_classes):
            pixels = self.load(label)
            sides.setdefault(pixels.shape[-1], label)
            self.image_counts.append(len(pixels))
        if len(sides) > 1:
            (one, first), (other, second) = list(sides.items())[:2]
            raise UserError(
                f"{self.folder}: images of class {first} are {one} pixels wide, of class {second} "
                f"{other}; {AGAIN}"
            )
        if class_file(self.folder, num_classes).exists():
            raise UserError(
                f"{class_file(self.folder, num_classes)}: the real set has {num_classes} classes "
                f"only; {AGAIN}"
            )
        self.resolution = next(iter(sides))
        self.labels = np.repeat(np.arange(num_classes), self.image_counts)

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, label: int) -> np.ndarray:
        """The images of a class, uint8 [n, 3, R, R], not read until they are looked at."""
        path = class_file(self.folder, label)
        pixels = mapped(path)
        square = pixels.ndim == 4 and pixels.shape[1] == 3 and pixels.shape[2] == pixels.shape[3]
        if pixels.dtype != np.uint8 or not square or not len(pixels):
            raise UserError(
                f"{path}: expected images uint8 [n, 3, R, R], got {pixels.dtype} "
                f"{list(pixels.shape)}; {AGAIN}"
            )
        return pixels

    def provenance(self, label: int) -> list[dict[str, Any]]:
        """Where each image of a class comes from; empty where that was not written."""
        path = provenance_file(self.folder, label)
        rows = files.read_json(path) if path.exists() else []
        if rows and len(rows) != self.image_counts[label]:
            raise UserError(
                f"{path}: {len(rows)} rows for {self.image_counts[label]} images; {AGAIN}"
            )
        return rows

    def hints(self) -> dict[str, Any]:
        path = hints_file(self.folder)
        return files.read_json(path) if path.exists() else {}

    def learned(self) -> np.ndarray | None:
        """Learned logits float32 [N, C], memory-mapped; None where labels were not learned."""
        path = learned_file(self.folder)
        if not path.exists():
            return None
        logits, expected = mapped(path), (len(self), self.num_classes)
        if logits.dtype != np.float32 or logits.shape != expected:
            raise UserError(
                f"{path}: expected logits float32 {list(expected)}, got {logits.dtype} "
                f"{list(logits.shape)}; {AGAIN}"
            )
        return logits

    def images(self, device: torch.device, memory_gb: float) -> Images:
        """Held in memory where they fit into `memory_gb` GiB, else read as they are needed."""
        if len(self) * 3 * self.resolution**2 > memory_gb * 2**30:
            return StreamedClasses(self, device)
        pixels = np.concatenate([self.load(c) for c in range(self.num_classes)])
        return MemoryImages(pixels, self.labels, device)


class StreamedClasses:
    """Images of a distilled set, read as they are needed: the same batches as from memory.

    A class's file is mapped for one batch only. Maps that stay would count as memory, and take a
    file descriptor each.
    """

    def __init__(self, distilled: Distilled, device: torch.device):
        self.distilled, self.device = distilled, device
        self.labels, self.resolution = distilled.labels, distilled.resolution
        self.sizes = np.full((len(self.labels), 2), self.resolution)
        self.counts = np.bincount(self.labels)
        self._first = np.cumsum([0, *distilled.image_counts])

    def stream(self, plans: Iterable[Plan], spec: ViewSpec) -> Iterator[torch.Tensor]:
        """Images of each plan, float [n, 3, R, R] in [0, 1], in the plans' order."""
        with ThreadPoolExecutor(1, "distilled") as pool:
            for (_, views), pixels in ahead(pool, self._read, plans, AHEAD):
                images = torch.from_numpy(pixels).to(self.device, non_blocking=True).float() / 255
                yield images if views is None else augment.apply(images, views, spec)

    def _read(self, plan: Plan) -> np.ndarray:
        """The whole images of a plan, uint8 [n, 3, R, R], each class's file opened once."""
        indices, side = np.asarray(plan[0], np.int64), self.resolution
        out = np.empty((len(indices), 3, side, side), np.uint8)
        classes = self.labels[indices]
        for label in np.unique(classes):
            at = np.flatnonzero(classes == label)
            out[at] = self.distilled.load(int(label))[indices[at] - self._first[label]]
        return out


def mapped(path: Path) -> np.ndarray:
    """The array in `path`, not read until it is looked at. Raises `UserError` where it is missing
    or damaged. (Copied on writing: torch warns of arrays that cannot be written to.)"""
    try:
        return np.lib.format.open_memmap(path, mode="c")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {AGAIN}") from None
    except OSError as error:
        raise files.kind(error)(f"cannot read {path}: {error.strerror or error}") from None
    except (EOFError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); {AGAIN}") from None
