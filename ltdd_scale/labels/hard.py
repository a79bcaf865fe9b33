"""Labels "hard": the classes, mixed as the images are. Nobody makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ltdd_scale.labels.contract import Maker
from ltdd_scale.labels.views import EpochViews, mix, onehot
from ltdd_scale.runtime.ranks import Ranks


class Hard:
    """See `contract.Labels`."""

    kind = "hard"

    def __init__(self, maker: Maker):
        self.onehot = onehot(maker.images.labels, maker.num_classes, maker.ranks.device)

    def view_key(self, student_seed: int | str, epoch: int) -> tuple[int | str, int]:
        return student_seed, epoch

    def targets(
        self, epoch: int, drawn: EpochViews, indices: np.ndarray, x: Tensor, ranks: Ranks
    ) -> tuple[Tensor, None]:
        return mix(self.onehot, drawn, indices), None


def make(maker: Maker, folder: Path, context: Any) -> dict[str, Any]:
    return {}


def load(folder: Path, facts: dict[str, Any], maker: Maker) -> Hard:
    return Hard(maker)


def fresh(maker: Maker) -> Hard:
    return Hard(maker)
