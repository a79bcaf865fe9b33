"""Labels "single": one soft label an image, the teacher's logits on the whole image.

Or their mean over the whole image and some views, with a share of the class: see `Single` in
`settings.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltdd_scale.data import distilled
from ltdd_scale.labels.adjust import logits_of, shift_of, shifted, tau_of, whole_logits
from ltdd_scale.labels.contract import Maker, label_key
from ltdd_scale.labels.mixture import with_class
from ltdd_scale.labels.views import EpochViews, mix, mix_logits, onehot
from ltdd_scale.runtime.ranks import Ranks, rng

FILE = "single.npy"  # float32 [n, C], adjusted and with the class's share: what students learn


class Single:
    """See `contract.Labels`. `table` float32 [n, C] are logits."""

    kind = "single"

    def __init__(self, maker: Maker, table: Tensor):
        self.onehot = onehot(maker.images.labels, maker.num_classes, maker.ranks.device)
        self.table, self.temperature = table, maker.temperature

    def view_key(self, student_seed: int | str, epoch: int) -> tuple[int | str, int]:
        return student_seed, epoch

    def targets(
        self, epoch: int, drawn: EpochViews, indices: np.ndarray, x: Tensor, ranks: Ranks
    ) -> tuple[Tensor, Tensor]:
        logits = mix_logits(self.table, drawn, indices, self.temperature)
        return mix(self.onehot, drawn, indices), logits


def _table(maker: Maker) -> tuple[Tensor, float]:
    """(logits float32 [n, C], adjusted and with the class's share, τ). τ is found on the mean over
    views, which is what is adjusted."""
    logits, device = mean_logits(maker), maker.ranks.device
    tau = tau_of(maker, logits)
    found = shifted(logits, shift_of(tau, maker.train_counts, device))
    share = maker.relabel.class_share
    if share:
        every = torch.arange(len(found), device=device)
        classes = onehot(maker.images.labels, maker.num_classes, device)[every]
        found = with_class(found, classes, share)
    return found, tau


def mean_logits(maker: Maker) -> Tensor:
    """The teacher's logits, their mean over the whole image and `relabel.views` − 1 views of it,
    float32 [n, C], not adjusted.

    Views are drawn from `maker.spec`, as a student's are, from (the labels' seed, number of the
    view) for all images at once: the same for any batch size, on any rank.
    """
    total, wanted = whole_logits(maker), maker.relabel.views
    for k in range(1, wanted):
        draw = rng(label_key(maker.seed), "views of single labels", k)
        total = total + logits_of(maker, maker.spec.draw(draw, maker.images.sizes))
    return total / wanted


def make(maker: Maker, folder: Path, context: Any) -> dict[str, Any]:
    """Write ``single.npy``."""
    table, tau = _table(maker)
    if maker.ranks.is_main:
        distilled.save(folder / FILE, table.cpu().numpy())
    return {"tau": tau, "class_share": maker.relabel.class_share}


def load(folder: Path, facts: dict[str, Any], maker: Maker) -> Single:
    return Single(maker, torch.from_numpy(distilled.load(folder / FILE)).to(maker.ranks.device))


def fresh(maker: Maker) -> Single:
    return Single(maker, _table(maker)[0])
