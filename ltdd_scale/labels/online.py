"""Labels "online": the teacher's logits on the very view that the student sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ltdd_scale.labels.adjust import shift_of, shifted, tau_of
from ltdd_scale.labels.contract import Maker
from ltdd_scale.labels.mixture import with_class
from ltdd_scale.labels.views import EpochViews, mix, onehot
from ltdd_scale.runtime.ranks import Ranks


class Online:
    """See `contract.Labels`. `share` is that of the class (`mixture.py`), mixed as the view is."""

    kind = "online"

    def __init__(self, maker: Maker, tau: float, share: float = 0.0):
        device = maker.ranks.device
        self.onehot = onehot(maker.images.labels, maker.num_classes, device)
        self.teach, self.shift = maker.teach, shift_of(tau, maker.train_counts, device)
        self.share = share

    def view_key(self, student_seed: int | str, epoch: int) -> tuple[int | str, int]:
        return student_seed, epoch

    def targets(
        self, epoch: int, drawn: EpochViews, indices: np.ndarray, x: Tensor, ranks: Ranks
    ) -> tuple[Tensor, Tensor]:
        classes, logits = mix(self.onehot, drawn, indices), shifted(self.teach(x), self.shift)
        return classes, with_class(logits, classes, self.share)


def make(maker: Maker, folder: Path, context: Any) -> dict[str, Any]:
    """Only τ and the class's share: the teacher labels at student time."""
    return {"tau": tau_of(maker), "class_share": maker.relabel.class_share}


def load(folder: Path, facts: dict[str, Any], maker: Maker) -> Online:
    # Labels from before there was a share have none.
    return Online(maker, facts["tau"], facts.get("class_share", 0.0))


def fresh(maker: Maker) -> Online:
    return Online(maker, tau_of(maker), maker.relabel.class_share)
