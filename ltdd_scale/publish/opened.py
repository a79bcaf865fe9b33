"""A set that was exported: its images as they lie there, its soft labels, what it tells."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ltdd_scale.data.split import IMAGE_NAMES
from ltdd_scale.errors import UserError
from ltdd_scale.publish.encode import Encoding
from ltdd_scale.publish.settings import Publish
from ltdd_scale.runtime import files
from ltdd_scale.settings import parse

SOFT = ("single.npy", "learned.npy")  # tables of one soft label an image
# What `set.json` has in every format.
TOLD = ("name", "ipc", "classes", "folders", "train_counts", "resolution", "mean", "std", "labels")
TOLD += ("student", "config")


def numbered(k: int, count: int) -> str:
    """`k` of `count` in a file's name, so that names sort as numbers do: five digits or more."""
    return f"{k:0{max(5, len(str(count - 1)))}d}"


@dataclass(frozen=True)
class Sample:
    """The `k`-th image of class `label` as the bytes of its file. `name` is ``<class>/00000.png``,
    `soft` its logits float32 [C] or None."""

    label: int
    k: int
    name: str
    content: bytes
    soft: np.ndarray | None

    @property
    def suffix(self) -> str:
        return self.name.rpartition(".")[2]


class Opened:
    """The exported set in `folder`. Raises `UserError` where there is none, or where its
    ``set.json`` does not say all that every format says."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        if not (self.folder / "set.json").exists():
            raise UserError(f"{folder} is not a distilled set (no set.json in it)")
        self.told: dict[str, Any] = files.read_json(self.folder / "set.json")
        missing = [n for n in TOLD if not isinstance(self.told, dict) or n not in self.told]
        if missing:
            raise UserError(
                f"{self.folder / 'set.json'} does not say all of a distilled set "
                f"({missing[0]!r} is missing): write the set anew, by 'ltdd-scale run'"
            )

    @property
    def num_classes(self) -> int:
        return len(self.told["classes"])

    @property
    def kept(self) -> str:
        """Which images it has: distilled, or initial or random ones that were chosen instead."""
        return self.told.get("chosen", {}).get("set", "distilled")

    @property
    def publish(self) -> Publish:
        """Its settings; the defaults for a set that was written before there were such."""
        return parse(Publish, self.told["config"].get("publish", {}), "publish.")

    @property
    def encoding(self) -> Encoding:
        """How its images are encoded. Sets that do not say so have PNGs."""
        images = self.told.get("images", {"format": "png"})
        return Encoding(images["format"], images.get("quality") or Encoding.quality)

    @property
    def names(self) -> list[str]:
        """Names of the classes, no two the same: those of their folders where classes share one."""
        classes = self.told["classes"]
        return classes if len(set(classes)) == len(classes) else self.told["folders"]

    @cached_property
    def paths(self) -> list[list[Path]]:
        """The image files of each class, in the order of the labels' rows."""
        out = []
        for name in self.told["folders"]:
            folder = self.folder / "images" / name
            found = sorted(p for p in folder.glob("*") if p.suffix.lower() in IMAGE_NAMES)
            if not found:
                raise UserError(
                    f"{folder}: no images there; this needs a set with its folder of images"
                )
            out.append(found)
        return out

    @property
    def image_counts(self) -> list[int]:
        return [len(found) for found in self.paths]

    @cached_property
    def soft(self) -> np.ndarray | None:
        """Logits float32 [N, C] of the soft labels, memory-mapped, rows in the order of `paths`;
        None where the set has plain classes only."""
        for name in SOFT:
            path = self.folder / "labels" / name
            if path.exists():
                table = np.load(path, mmap_mode="r")
                expected = (sum(self.image_counts), self.num_classes)
                if table.shape != expected:
                    raise UserError(
                        f"{path}: expected logits {list(expected)}, got {list(table.shape)}"
                    )
                return table
        return None

    def samples(self) -> Iterator[Sample]:
        """All images, class after class: the order of the labels' rows."""
        for label, found in enumerate(self.paths):
            for k in range(len(found)):
                yield self._sample(label, k)

    def rounds(self) -> Iterator[Sample]:
        """All images, round after round over the classes: any stretch of them is balanced."""
        for k in range(max(self.image_counts)):
            for label, found in enumerate(self.paths):
                if k < len(found):
                    yield self._sample(label, k)

    @cached_property
    def _first(self) -> np.ndarray:
        return np.cumsum([0, *self.image_counts])

    def _sample(self, label: int, k: int) -> Sample:
        path = self.paths[label][k]
        soft = None if self.soft is None else np.asarray(self.soft[self._first[label] + k])
        name = f"{self.told['folders'][label]}/{path.name}"
        return Sample(label, k, name, path.read_bytes(), soft)
