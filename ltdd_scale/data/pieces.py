"""What a loader decodes of the images of a plan, and which views it cuts out of that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ltdd_scale.data import augment
from ltdd_scale.data.augment import Views
from ltdd_scale.data.images import Plan, runs


@dataclass(frozen=True)
class Piece:
    """Some decodings in a row, and the views that are cut out of them.

    `decoded` int [m]: the image of each decoding; `boxes` int32 [m, 4]: what is decoded of it (top,
    left, height, width, in its pixels). View k is the box `cuts[k]` (int32 [n, 4], in pixels of
    what was decoded) of decoding `of[k]`, `mirrored[k]` or not; `views`: what was drawn for them.
    Several views may be one cut: view k is number `shown[k]` of them. `ends`: the plan's last
    piece.
    """

    decoded: np.ndarray
    boxes: np.ndarray
    cuts: np.ndarray
    of: np.ndarray
    mirrored: np.ndarray
    shown: np.ndarray
    views: Views | None
    ends: bool


def pieces(plan: Plan, sizes: np.ndarray, whole: bool, size: int, most: int) -> Iterator[Piece]:
    """The plan in pieces of at most `size` decodings, each for at most `most` views.

    `most`: 0 is any number. `whole`: views are of whole images, and are made later.
    """
    indices, views = plan
    whole = whole or views is None
    starts = runs(indices, 0 if whole else most)  # whole images are all one view
    edges = np.append(starts, len(indices))
    for i in range(0, max(len(starts), 1), size):
        own = edges[i : i + size + 1]
        first, lengths = own[:-1], np.diff(own)
        here = slice(own[0], own[-1])
        of = np.repeat(np.arange(len(first)), lengths)
        seen = None if views is None else views[here]
        if whole:
            boxes = augment.centre_boxes(sizes[indices[first]])
            cuts = boxes * np.array([0, 0, 1, 1], np.int32)
            mirrored, shown, of = np.zeros(len(first), bool), of, np.arange(len(first))
        else:
            assert seen is not None
            windows = augment.pixel_boxes(seen.windows, sizes[indices[here]])
            boxes = augment.hulls(windows, first - own[0]) if len(first) else windows
            cuts, mirrored, shown = windows.copy(), seen.mirrored, np.arange(len(of))
            cuts[:, :2] -= boxes[of, :2]
        ends = i + size >= len(starts)
        yield Piece(indices[first], boxes, cuts, of, mirrored, shown, seen, ends)
