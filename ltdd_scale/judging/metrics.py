"""Accuracies of a network, their mean over seeds, and post-hoc logit adjustment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltdd_scale.data.longtail import GROUPS
from ltdd_scale.results import NUMBERS


def metrics(logits: Tensor, labels: np.ndarray, groups: Sequence[str]) -> dict[str, Any]:
    """The numbers of `results.NUMBERS` and "per_class", all in per cent.

    `logits` float [N, C], `labels` int64 [N], `groups` the group of each class (`longtail.GROUPS`).
    "balanced" is the mean over classes of the accuracy in a class, "class_std" its population
    standard deviation. Classes without images have no accuracy: they are None in "per_class" and
    left out of all means; a group without any other class is None.
    """
    target = torch.from_numpy(labels)
    ranked = logits.topk(min(5, logits.shape[1]), 1).indices == target[:, None]
    per_class: dict[int, float] = {}
    for c in range(logits.shape[1]):
        hits = ranked[target == c, 0]
        if len(hits):
            per_class[c] = float(hits.float().mean()) * 100
    accuracies = np.asarray(list(per_class.values()))
    out: dict[str, Any] = {
        "top1": float(ranked[:, 0].float().mean()) * 100,
        "balanced": float(accuracies.mean()),
        "top5": float(ranked.any(1).float().mean()) * 100,
        "class_std": float(accuracies.std()),
    }
    for group in GROUPS:
        members = [per_class[c] for c, g in enumerate(groups) if g == group and c in per_class]
        out[group] = float(np.mean(members)) if members else None
    listed = [round(per_class[c], 2) if c in per_class else None for c in range(logits.shape[1])]
    return {**{k: None if v is None else round(v, 3) for k, v in out.items()}, "per_class": listed}


def logit_adjusted(logits: Tensor, counts: np.ndarray, tau: float = 1.0) -> Tensor:
    """logits − τ·log π, float32 [N, C]: the class prior π of the training set, of `counts` [C]
    images, taken out after training (Menon et al., ICLR 2021, eq. 9)."""
    prior = counts / counts.sum()
    return logits - tau * torch.from_numpy(np.log(prior)).float().to(logits.device)


def mean_of(members: Sequence[dict[str, Any]], numbers: Sequence[str] = NUMBERS) -> dict[str, Any]:
    """Mean and sample standard deviation (``…_std``) of each of `numbers` over rows of `metrics`,
    with "num_seeds" and the mean "per_class"."""
    out: dict[str, Any] = {"num_seeds": len(members)}
    for number in numbers:
        values = [m[number] for m in members if m[number] is not None]
        out[number] = round(float(np.mean(values)), 2) if values else None
        spread = round(float(np.std(values, ddof=1)), 2) if len(values) > 1 else None
        out[f"{number}_std"] = spread
    columns = zip(*(m["per_class"] for m in members), strict=True)
    # All are judged on the same images, so a class is missing in all of them or in none.
    means = [None if c[0] is None else round(float(np.mean(c)), 2) for c in columns]
    return {**out, "per_class": means}


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`mean_of` for each (set, labels, net), in the rows' order."""
    cells: dict[tuple, list[dict]] = {}
    for row in rows:
        cells.setdefault((row["set"], row["labels"], row["net"]), []).append(row)
    return [
        {"set": which, "labels": kind, "net": net, "ipc": members[0]["ipc"], **mean_of(members)}
        for (which, kind, net), members in cells.items()
    ]
