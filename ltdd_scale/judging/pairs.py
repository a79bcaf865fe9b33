"""All pairs of a first and a second stage, out of the logits that a run has saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltdd_scale.judging import routing
from ltdd_scale.judging.criteria import Groups
from ltdd_scale.judging.metrics import logit_adjusted, mean_of
from ltdd_scale.judging.saved import Saved
from ltdd_scale.judging.settings import ADJUSTED
from ltdd_scale.results import GROUPS_PART, TRAINED

# Networks of all classes, as tables call them; with `ADJUSTED` after logit adjustment.
NETWORKS = {
    "distilled": "distilled",
    "random": "random real",
    "full": "whole set, same labels",
    "full_adjusted": "whole set, same labels, logit-adjusted",
    "plain": "plain, whole set",
    "plain_adjusted": "plain, logit-adjusted",
    "teacher": "teacher",
    "teacher_adjusted": "teacher, logit-adjusted",
}
SETS = {"plain": "whole set", "distilled": "distilled", "random": "random real"}  # of `TRAINED`
PAPER = ("trained_whole", "trained_distilled")  # the pair of the paper: `TRAINED` of both stages


@dataclass(frozen=True)
class Table:
    """The logits of a run, and what is needed to judge all pairs of them.

    `saved`: the students of the run. `networks`: logits float [N, C] that do not depend on a
    student's seed, such as the teacher's. `labels`: int64 [N], of the judged images. `counts`: the
    training images of each class. `shots`: many, medium or few for each class (see `metrics`).
    `groups`: the groups of classes.
    """

    saved: Saved
    networks: Mapping[str, Tensor]
    labels: np.ndarray
    counts: np.ndarray
    shots: Sequence[str]
    groups: Groups

    def seeds(self) -> list[int]:
        """The seeds of the students of the distilled set."""
        found = [row["seed"] for row in self.saved.rows if row["set"] == "distilled"]
        return list(dict.fromkeys(found))

    def logits(self, name: str, seed: int) -> Tensor | None:
        """Logits [N, C] of a network of all classes; None where the run does not have it."""
        which = name.removesuffix(ADJUSTED)
        found = self.networks[which] if self.seedless(name) else self.saved.logits(which, seed)
        if found is None or which == name:
            return found
        return logit_adjusted(found, self.counts)

    def seedless(self, name: str) -> bool:
        """Whether the network is the same with every seed."""
        return name.removesuffix(ADJUSTED) in self.networks

    def first(self, name: str, seed: int) -> Tensor | None:
        """log p(g|x) [N, k] by the candidate `name`; None where the run does not have it."""
        if name in TRAINED:
            found = self.saved.logits(TRAINED[name], seed, GROUPS_PART)
            return None if found is None else found.log_softmax(1)
        found = self.logits(name, seed)
        return None if found is None else routing.summed(found, self.groups)

    def second(self, name: str, seed: int) -> Tensor | None:
        """log p(c|g, x) [N, C] by the candidate `name`; None where the run does not have it."""
        if name not in TRAINED:
            found = self.logits(name, seed)
            return None if found is None else routing.restricted(found, self.groups)
        parts = [self.saved.logits(TRAINED[name], seed, f"g{g}") for g in range(len(self.groups))]
        there = [part for part in parts if part is not None]
        return routing.joined(there, self.groups) if len(there) == len(parts) else None

    def judge(self, scores: Tensor) -> dict[str, Any]:
        """Numbers and "group_acc" of class scores [N, C]."""
        return routing.judge(scores, self.labels, self.shots, self.groups)


def rows(table: Table, first: Sequence[str], second: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of ``results.json``: each network in one stage, then all pairs with both routings. The
    numbers are means over seeds.

    Left out are networks that the run does not have, and soft routing of a network with itself: it
    gives that network in one stage.
    """
    found: dict[tuple, list[dict[str, Any]]] = {}
    for number, seed in enumerate(table.seeds()):
        # A network that is the same with every seed is judged with the first one only.
        once = {name for name in NETWORKS if number and table.seedless(name)}
        _one_stage(table, seed, once, found)
        _two_stages(table, seed, (first, second), once, found)
    net = table.saved.net
    # In the order of the first seed: other seeds may lack some rows.
    return [
        {
            "first": key[0],
            "second": key[1],
            "routing": key[2],
            "net": net,
            **mean_of(members, routing.TWO_STAGE_NUMBERS),
        }
        for key, members in found.items()
    ]


def _one_stage(table: Table, seed: int, once: set[str], found: dict[tuple, list]) -> None:
    for name, title in NETWORKS.items():
        logits = None if name in once else table.logits(name, seed)
        if logits is not None:
            row = table.judge(logits)
            row["in_group_acc"] = routing.in_group(logits, table.labels, table.groups)
            found.setdefault((None, title, None), []).append(row)


def _two_stages(
    table: Table,
    seed: int,
    asked: tuple[Sequence[str], Sequence[str]],
    once: set[str],
    found: dict[tuple, list],
) -> None:
    firsts = {n: p for n in dict.fromkeys(asked[0]) if (p := table.first(n, seed)) is not None}
    for name in dict.fromkeys(asked[1]):
        within = table.second(name, seed)
        if within is None:
            continue
        in_group = routing.in_group(within, table.labels, table.groups)
        for group, probabilities in firsts.items():
            if {group, name} <= once:
                continue
            for how in routing.ROUTINGS:
                if how == "soft" and group == name and name not in TRAINED:
                    continue
                row = table.judge(routing.routed(probabilities, within, table.groups, how))
                key = (first_title(group), second_title(name), how)
                found.setdefault(key, []).append({**row, "in_group_acc": in_group})


def first_title(name: str) -> str:
    if name in TRAINED:
        return f"group classifier, {SETS[TRAINED[name]]}"
    return f"summed, {NETWORKS[name]}"


def second_title(name: str) -> str:
    if name in TRAINED:
        return f"in-group students, {SETS[TRAINED[name]]}"
    return f"restricted, {NETWORKS[name]}"


def paper_scores(table: Table, seed: int) -> Tensor | None:
    """Scores [N, C] of the paper's pair with hard routing; None where it was not trained."""
    first, second = table.first(PAPER[0], seed), table.second(PAPER[1], seed)
    if first is None or second is None:
        return None
    return routing.routed(first, second, table.groups, "hard")


def confusion(scores: Tensor, labels: np.ndarray) -> np.ndarray:
    """Confusion matrix of `scores` [N, C], int32 [C, C]: row = true class of an image, column =
    class of its largest score."""
    num_classes = scores.shape[1]
    pairs = torch.from_numpy(labels) * num_classes + scores.argmax(1)
    counted = torch.bincount(pairs, minlength=num_classes**2)
    return counted.reshape(num_classes, num_classes).numpy().astype(np.int32)
