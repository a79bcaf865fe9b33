"""Labels "single": one soft label an image, the teacher's logits on the whole image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltdd_scale.data import distilled
from ltdd_scale.labels.adjust import shift_of, shifted, tau_of, whole_logits
from ltdd_scale.labels.contract import Maker
from ltdd_scale.labels.views import EpochViews, mix, onehot
from ltdd_scale.runtime.ranks import Ranks

FILE = "single.npy"  # float32 [n, C], adjusted


class Single:
    """See `contract.Labels`. `table` float32 [n, C] is mixed as the images are."""

    kind = "single"

    def __init__(self, maker: Maker, table: Tensor):
        self.onehot = onehot(maker.images.labels, maker.num_classes, maker.ranks.device)
        self.table = table

    def view_key(self, student_seed: int | str, epoch: int) -> tuple[int | str, int]:
        return student_seed, epoch

    def targets(
        self, epoch: int, drawn: EpochViews, indices: np.ndarray, x: Tensor, ranks: Ranks
    ) -> tuple[Tensor, Tensor]:
        return mix(self.onehot, drawn, indices), mix(self.table, drawn, indices)


def _table(maker: Maker) -> tuple[Tensor, float]:
    """(adjusted logits float32 [n, C], τ)."""
    logits = whole_logits(maker)
    tau = tau_of(maker, logits)
    return shifted(logits, shift_of(tau, maker.train_counts, maker.ranks.device)), tau


def make(maker: Maker, folder: Path, context: Any) -> dict[str, Any]:
    """Write ``single.npy``."""
    table, tau = _table(maker)
    if maker.ranks.is_main:
        distilled.save(folder / FILE, table.cpu().numpy())
    return {"tau": tau}


def load(folder: Path, facts: dict[str, Any], maker: Maker) -> Single:
    return Single(maker, torch.from_numpy(distilled.load(folder / FILE)).to(maker.ranks.device))


def fresh(maker: Maker) -> Single:
    return Single(maker, _table(maker)[0])
