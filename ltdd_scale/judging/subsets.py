"""Students of a part of the classes: which images they see, and which targets.

The labels are those of the whole set, made as for every other student (so ADSA finds the same τ),
and mapped: a group classifier learns sums over groups, an in-group student the columns of its
classes on the images of its group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.images import Images, Plan
from ltdd_scale.errors import UserError
from ltdd_scale.judging.criteria import Groups, group_of
from ltdd_scale.labels.contract import Labels
from ltdd_scale.labels.views import EpochViews
from ltdd_scale.results import GROUPS_PART
from ltdd_scale.runtime import files
from ltdd_scale.runtime.ranks import Ranks


@dataclass(frozen=True)
class Part:
    """What a student tells apart: the `groups` of `num_all` classes themselves, or the classes of
    the group `index`."""

    groups: Groups
    num_all: int
    index: int | None

    @property
    def num_classes(self) -> int:
        return len(self.groups) if self.index is None else len(self.groups[self.index])

    def members(self, labels: np.ndarray) -> np.ndarray:
        """The images that it is about: indices into `labels` int64 [N]."""
        if self.index is None:
            return np.arange(len(labels))
        return np.flatnonzero(np.isin(labels, self.groups[self.index]))

    def own(self, labels: np.ndarray) -> np.ndarray:
        """`labels` int64 [n] of all classes as its own: the group, or the place in the group."""
        if self.index is None:
            return group_of(self.groups, self.num_all)[labels]
        place = np.zeros(self.num_all, np.int64)
        place[self.groups[self.index]] = np.arange(self.num_classes)
        return place[labels]

    def of(self, images: Images, labels: Labels) -> tuple[Images, Labels]:
        """The images and the targets of its student, of those of all classes."""
        if self.index is None:
            return images, Summed(labels, self.groups)
        members = self.members(images.labels)
        columns = self.groups[self.index]
        return Subset(images, members), Within(labels, members, len(images.labels), columns)


def part_of(name: str, folder: Path) -> Part:
    """The part of that name (`Student.part`), of the groups in a folder of the stage "grouping"."""
    told = files.read_json(folder / "grouping.json")
    groups, index = told["groups"], None if name == GROUPS_PART else int(name[1:])
    if index is not None and index >= len(groups):
        raise UserError(f"there are {len(groups)} groups of classes, and no group {name}")
    return Part(groups, len(told["classes"]), index)


class Subset:
    """Some images of a set (`data.images.Images`): `members` int [n] of them."""

    def __init__(self, images: Images, members: np.ndarray):
        self.images, self.members, self.resolution = images, members, images.resolution
        self.labels, self.sizes = images.labels[members], images.sizes[members]
        self.counts = np.bincount(self.labels, minlength=len(images.counts))

    def stream(self, plans: Iterable[Plan], spec: ViewSpec) -> Iterator[Tensor]:
        return self.images.stream([(self.members[i], views) for i, views in plans], spec)


class Summed:
    """Labels of groups (`labels.contract.Labels`): classes are summed over a group, logits are the
    logarithm of the summed exponentials, so that their softmax sums too."""

    def __init__(self, labels: Labels, groups: Groups):
        self.labels, self.groups, self.kind = labels, groups, labels.kind

    def view_key(self, student_seed: int | str, epoch: int) -> tuple[int | str, int]:
        return self.labels.view_key(student_seed, epoch)

    def targets(
        self, epoch: int, drawn: EpochViews, indices: np.ndarray, x: Tensor, ranks: Ranks
    ) -> tuple[Tensor, Tensor | None]:
        classes, logits = self.labels.targets(epoch, drawn, indices, x, ranks)
        mixed = torch.stack([classes[:, group].sum(1) for group in self.groups], 1)
        return mixed, None if logits is None else log_sums(logits, self.groups)


class Within:
    """Labels of one group (`labels.contract.Labels`): the `columns` of its classes, of its images,
    which are `members` int [n] of the `num_images` that `labels` knows.

    CutMix partners are images of the group. Learned labels are scaled to a sum of 1.
    """

    def __init__(self, labels: Labels, members: np.ndarray, num_images: int, columns: list[int]):
        self.labels, self.members, self.columns = labels, members, columns
        self.num_images, self.kind = num_images, labels.kind
        self._of: tuple[EpochViews | None, EpochViews | None] = (None, None)

    def view_key(self, student_seed: int | str, epoch: int) -> tuple[int | str, int]:
        return self.labels.view_key(student_seed, epoch)

    def targets(
        self, epoch: int, drawn: EpochViews, indices: np.ndarray, x: Tensor, ranks: Ranks
    ) -> tuple[Tensor, Tensor | None]:
        whole = self._whole(drawn)
        classes, logits = self.labels.targets(epoch, whole, self.members[indices], x, ranks)
        own = classes[:, self.columns]
        own = own / own.sum(1, keepdim=True).clamp_min(1e-12)
        return own, None if logits is None else logits[:, self.columns]

    def _whole(self, drawn: EpochViews) -> EpochViews:
        """The views of an epoch, as of all images: labels look at partners and shares only."""
        if self._of[0] is not drawn:
            partners = np.arange(self.num_images)
            lam = np.ones(self.num_images, drawn.lam.dtype)
            partners[self.members], lam[self.members] = self.members[drawn.partners], drawn.lam
            self._of = (drawn, EpochViews(drawn.views, partners, drawn.boxes, lam))
        whole = self._of[1]
        assert whole is not None
        return whole


def log_sums(logits: Tensor, groups: Groups) -> Tensor:
    """log Σ exp of `logits` [n, C] over each group: [n, k]."""
    return torch.stack([logits[:, group].logsumexp(1) for group in groups], 1)
