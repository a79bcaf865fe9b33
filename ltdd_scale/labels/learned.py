"""Labels "learned": the soft labels that a distilled set brings, learned with its images.

A student's loss is the cross-entropy with them, mixed as the images are. No network is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ltdd_scale.data import distilled
from ltdd_scale.errors import UserError
from ltdd_scale.labels.contract import Maker
from ltdd_scale.labels.views import EpochViews, mix
from ltdd_scale.runtime.ranks import Ranks

FILE = "learned.npy"  # logits float32 [n, C]


class Learned:
    """See `contract.Labels`. `logits` float32 [n, C]; the targets are their softmax."""

    kind = "learned"

    def __init__(self, maker: Maker, logits: np.ndarray):
        self.table = F.softmax(torch.from_numpy(logits).to(maker.ranks.device), 1)

    def view_key(self, student_seed: int | str, epoch: int) -> tuple[int | str, int]:
        return student_seed, epoch

    def targets(
        self, epoch: int, drawn: EpochViews, indices: np.ndarray, x: Tensor, ranks: Ranks
    ) -> tuple[Tensor, None]:
        return mix(self.table, drawn, indices), None


def _brought(maker: Maker) -> np.ndarray:
    """The logits float32 [n, C] that came with the set."""
    if maker.learned is None:
        raise UserError(
            "the distilled set brings no learned labels (there is no labels.npy in its folder): "
            "choose another relabel.labels"
        )
    logits = np.asarray(maker.learned, np.float32)
    if not np.isfinite(logits).all():
        raise UserError(
            "the learned labels of the distilled set are not finite: lower the rate at which the "
            "method learns them"
        )
    return logits


def make(maker: Maker, folder: Path, context: Any) -> dict[str, Any]:
    """Write ``learned.npy``, so that the labels are where those of every other kind are."""
    logits = _brought(maker)
    if maker.ranks.is_main:
        distilled.save(folder / FILE, logits)
    return {}


def load(folder: Path, facts: dict[str, Any], maker: Maker) -> Learned:
    """Raises `UserError` where the file is missing, damaged, or of another set."""
    logits, expected = distilled.load(folder / FILE), (len(maker.images.labels), maker.num_classes)
    if logits.dtype != np.float32 or logits.shape != expected:
        raise UserError(
            f"{folder / FILE}: expected logits float32 {list(expected)}, got {logits.dtype} "
            f"{list(logits.shape)}; delete {folder} and make the labels again"
        )
    return Learned(maker, logits)


def fresh(maker: Maker) -> Learned:
    return Learned(maker, _brought(maker))
