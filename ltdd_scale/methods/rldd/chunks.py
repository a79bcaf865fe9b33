"""How recovery's work is cut: class chunks, each one batch and one unit of work.

Classes are taken at a stride, so that head and tail meet in a batch, and some images of each. What
is in a chunk depends on the settings alone: the same bytes on any number of ranks.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ltdd_scale.stage import Facts

FEW = 10  # classes of a chunk, where no more fit with all their images


@dataclass(frozen=True)
class Chunk:
    """`classes` × images `first` … `last` − 1 of each."""

    number: int
    classes: tuple[int, ...]
    first: int
    last: int

    @property
    def labels(self) -> np.ndarray:
        """The class of each image, int64 [n]: all images of a class together."""
        return np.repeat(self.classes, self.last - self.first)


def chunks(num_classes: int, ipc: int, batch_size: int, chunk_classes: int = 0) -> list[Chunk]:
    """All chunks, of at most `batch_size` images.

    Chunk g of G takes classes g, g + G, …: the long tail, thinned, in every batch.
    `chunk_classes`: classes of a chunk, at most; 0: as many as fit with all their images, or ten
    where less than ten fit. So a chunk's images of a class say something about the class, and the
    whole chunk about all classes. Groups are about equally large: 11 classes are 6 and 5.
    """
    number, each = _numbers(num_classes, ipc, batch_size, chunk_classes)
    bounds = [ipc * k // each for k in range(each + 1)]
    out: list[Chunk] = []
    for g in range(number):
        classes = tuple(range(g, num_classes, number))
        for first, last in itertools.pairwise(bounds):
            out.append(Chunk(len(out), classes, first, last))
    return out


def _numbers(num_classes: int, ipc: int, batch_size: int, chunk_classes: int) -> tuple[int, int]:
    """Groups of classes, and the chunks of a group: as few as hold its images. These are shared out
    evenly: one image left over would be a chunk that costs as many steps as a full one, and is too
    small for statistics."""
    wanted = chunk_classes or max(FEW, batch_size // ipc)
    per_chunk = min(wanted, num_classes, batch_size)
    groups = -(-num_classes // per_chunk)
    fit = max(1, batch_size // -(-num_classes // groups))
    return groups, -(-ipc // fit)


def groups(
    num_classes: int, ipc: int, batch_size: int, chunk_classes: int = 0
) -> tuple[list[range], int]:
    """The classes of each group, and how many chunks a group has: `chunks` without a list of all
    of them, which may be long."""
    number, each = _numbers(num_classes, ipc, batch_size, chunk_classes)
    return [range(g, num_classes, number) for g in range(number)], each


def pieces(settings: Any, facts: Facts) -> int:
    """The number of chunks: more ranks than these have nothing to do."""
    recover = settings.recover
    own = facts.num_classes, settings.ipc, recover.batch_size, recover.chunk_classes
    return math.prod(_numbers(*own))
