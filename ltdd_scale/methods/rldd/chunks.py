"""How recovery's work is cut: class chunks, each one batch and one unit of work.

Classes are taken at a stride, so that head and tail meet in a batch, and some images of each. What
is in a chunk depends on the settings alone: the same bytes on any number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ltdd_scale.stage import Facts

FEWEST = 10  # classes of a chunk, unless the settings say another number


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
    where these are fewer. So a chunk's images of a class say something about the class, and the
    whole chunk about all classes.
    """
    number, images = _sizes(num_classes, ipc, batch_size, chunk_classes)
    out: list[Chunk] = []
    for g in range(number):
        for first in range(0, ipc, images):
            classes = tuple(range(g, num_classes, number))
            out.append(Chunk(len(out), classes, first, min(first + images, ipc)))
    return out


def _sizes(num_classes: int, ipc: int, batch_size: int, chunk_classes: int) -> tuple[int, int]:
    """Groups of classes, and the images of a class that one chunk has, at most: as many as fit, but
    about the same in all chunks of a group. One image left over would be a chunk that costs as many
    steps as a full one, and is too small for statistics."""
    wanted = chunk_classes or max(FEWEST, batch_size // ipc)
    per_chunk = min(wanted, num_classes, batch_size)
    groups = -(-num_classes // per_chunk)
    fit = max(1, batch_size // -(-num_classes // groups))
    return groups, -(-ipc // -(-ipc // fit))


def groups(
    num_classes: int, ipc: int, batch_size: int, chunk_classes: int = 0
) -> tuple[list[range], int]:
    """The classes of each group, and how many chunks a group has: `chunks` without a list of all
    of them, which may be long."""
    number, images = _sizes(num_classes, ipc, batch_size, chunk_classes)
    return [range(g, num_classes, number) for g in range(number)], -(-ipc // images)


def _count(num_classes: int, ipc: int, batch_size: int, chunk_classes: int) -> int:
    number, images = _sizes(num_classes, ipc, batch_size, chunk_classes)
    return number * -(-ipc // images)


def pieces(settings: Any, facts: Facts) -> int:
    """The number of chunks: more ranks than these have nothing to do."""
    recover = settings.recover
    return _count(facts.num_classes, settings.ipc, recover.batch_size, recover.chunk_classes)


def more_pieces(settings: Any, facts: Facts, world_size: int) -> str:
    """Which setting gives `world_size` ranks a chunk each; empty where none does."""
    recover, classes = settings.recover, facts.num_classes
    size = max(1, recover.batch_size * pieces(settings, facts) // world_size)
    while size > 1 and _count(classes, settings.ipc, size, recover.chunk_classes) < world_size:
        size -= 1
    if _count(classes, settings.ipc, size, recover.chunk_classes) < world_size:
        return ""
    return f"smaller chunks with --set recover.batch_size={size}"
