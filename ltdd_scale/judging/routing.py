"""Two stages out of logits: pure functions (logits, groups) → class scores → metrics.

Groups are lists of class numbers that hold every class once. All probabilities are logarithms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltdd_scale.judging.criteria import Groups, group_of
from ltdd_scale.judging.metrics import metrics
from ltdd_scale.judging.subsets import log_sums
from ltdd_scale.results import NUMBERS

ROUTINGS = ("hard", "soft")
TWO_STAGE_NUMBERS = ("group_acc", "in_group_acc", *NUMBERS)
BELOW = 1000.0  # what keeps the classes of other groups below those of the group that was taken


def summed(logits: Tensor, groups: Groups) -> Tensor:
    """log p(g|x) [N, k]: the summed probabilities of the classes of each group, of `logits`
    [N, C]."""
    return log_sums(logits.float().log_softmax(1), groups)


def restricted(logits: Tensor, groups: Groups) -> Tensor:
    """log p(c|g, x) [N, C] of a network of all classes: the softmax of `logits` [N, C] within each
    group."""
    out = torch.empty_like(logits, dtype=torch.float32)
    for group in groups:
        out[:, group] = logits[:, group].float().log_softmax(1)
    return out


def joined(parts: Sequence[Tensor], groups: Groups) -> Tensor:
    """log p(c|g, x) [N, C] of a student for each group, with logits [N, |g|]."""
    out = torch.empty(len(parts[0]), sum(map(len, groups)))
    for logits, group in zip(parts, groups, strict=True):
        out[:, group] = logits.float().log_softmax(1)
    return out


def routed(first: Tensor, second: Tensor, groups: Groups, routing: str) -> Tensor:
    """Scores of classes [N, C] of log p(g|x) `first` [N, k] and log p(c|g, x) `second` [N, C].

    soft: log p(c|x) = log p(g|x) + log p(c|g, x). hard: the group of the largest p(g|x), the class
    by `second` in it; classes of other groups come after, as soft routing ranks them (top-5 sees
    them where a group has few classes).
    """
    of = torch.from_numpy(group_of(groups, second.shape[1]))
    soft = first[:, of] + second
    if routing == "soft":
        return soft
    taken = first.argmax(1)[:, None] == of[None]
    return torch.where(taken, second, soft - BELOW)


def judge(
    scores: Tensor, labels: np.ndarray, shots: Sequence[str], groups: Groups
) -> dict[str, Any]:
    """`metrics` of `scores` [N, C], with "group_acc": the share of images, in per cent, that are
    put into a class of the right group. top-1 is never above it. `shots`: see `metrics`."""
    of = group_of(groups, scores.shape[1])
    right = of[scores.argmax(1).numpy()] == of[labels]
    return {"group_acc": _percent(right), **metrics(scores, labels, shots)}


def in_group(second: Tensor, labels: np.ndarray, groups: Groups) -> float:
    """Accuracy in per cent of `second` [N, C] where the true group is given."""
    of = torch.from_numpy(group_of(groups, second.shape[1]))
    true = of[torch.from_numpy(labels)]
    found = second.masked_fill(of[None] != true[:, None], -torch.inf).argmax(1)
    return _percent(found.numpy() == labels)


def _percent(right: np.ndarray) -> float:
    return round(float(right.mean()) * 100, 3)
