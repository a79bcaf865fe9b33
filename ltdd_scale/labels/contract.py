"""What a kind of labels is made from, and what it gives to a student.

A kind is one module of `labels/` and a line of `catalog.py`. The module has three functions:

    make(maker, folder, context) -> facts     what the stage relabel writes into its folder
    load(folder, facts, maker) -> Labels      from such a folder and the facts in its labels.json
    fresh(maker) -> Labels                    without a folder, for any other set of images

`fresh` gives the labels that `make` and `load` would give for the same images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.images import Images
from ltdd_scale.labels.settings import Views
from ltdd_scale.labels.views import EpochViews
from ltdd_scale.models.frozen import Frozen
from ltdd_scale.runtime.ranks import Ranks


@dataclass(frozen=True)
class Maker:
    """What making labels needs.

    `teacher` is None for labels that no network makes. `normalize` takes images float [n, 3, R, R]
    in [0, 1]. `spec` is what the student's views are drawn from, `views` their settings. `relabel`
    is what the kind depends on (`Kind.settings`), None where that is nothing or where labels are
    only loaded. `tell(done, total)` hears of each batch of a pass over all images; work may stop
    there. `train_counts` int [C] are the images of each class of the long-tailed set. `seed`
    is the config's, `epochs` the student's. `temperature` is T where the student learns by KL, None
    where by a squared error: labels of mixed images depend on it. `learned` are the logits float32
    [n, C] that the set brings, None where it brings none or nobody asks for them.
    """

    images: Images
    teacher: Frozen | None
    normalize: Callable[[Tensor], Tensor]
    spec: ViewSpec
    views: Views
    relabel: Any
    num_classes: int
    train_counts: np.ndarray
    seed: int
    epochs: int
    ranks: Ranks
    temperature: float | None
    learned: np.ndarray | None = None
    tell: Callable[[int, int], None] = lambda done, total: None

    def teach(self, x: Tensor) -> Tensor:
        """The teacher's logits float32 [n, C] on normalised images [n, 3, R, R]."""
        assert self.teacher is not None, "these labels need a teacher: see `Kind.teacher`"
        return self.teacher.logits(x)


class Labels(Protocol):
    """The targets of a set of images."""

    kind: str

    def view_key(self, student_seed: int | str, epoch: int) -> tuple[int | str, int]:
        """(seed, epoch) from which this epoch's views are drawn."""
        ...

    def targets(
        self, epoch: int, drawn: EpochViews, indices: np.ndarray, x: Tensor, ranks: Ranks
    ) -> tuple[Tensor, Tensor | None]:
        """(mixed classes float [b, C], logits float [b, C] or None) of images `indices` [b]. Where
        the second is None, the loss is the cross-entropy with the first.

        `x` are their views as the student sees them, normalised, [b, 3, R, R], from `drawn`.
        """
        ...


def label_key(seed: int) -> str:
    """The key from which the views of stored labels are drawn, by the config's seed."""
    return f"labels {seed}"
