"""The kinds of labels, a line each."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

from ltdd_scale.labels.settings import Adjusted, Single, Stored
from ltdd_scale.settings import Settings

HARD = "hard"  # the kind that every image has
SINGLE = "single"  # the kind that needs neither a teacher nor views once it is made


@dataclass(frozen=True)
class Kind:
    """`module` makes and reads such labels (see `labels/contract.py` for what a module has).

    `settings` is what of the section `relabel` they depend on, None where they depend on nothing.
    `teacher`: whether a network has to label the images. `views`: whether labels belong to the
    views of an epoch. `each_view`: whether a student's step needs a pass of the teacher. `of_set`:
    whether the distilled set brings these labels: no other images have them.
    """

    name: str
    module: str
    settings: type[Settings] | None
    teacher: bool
    views: bool = False
    each_view: bool = False
    of_set: bool = False

    @property
    def of_views(self) -> bool:
        """Whether a student needs the views or the teacher to get them: `relabel` writes single
        labels beside such."""
        return self.views or self.each_view

    def code(self) -> ModuleType:
        """The module that makes and reads such labels. It imports torch, this file does not."""
        return importlib.import_module(self.module)


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("online", "ltdd_scale.labels.online", Adjusted, teacher=True, each_view=True),
        Kind("stored", "ltdd_scale.labels.stored", Stored, teacher=True, views=True),
        Kind(SINGLE, "ltdd_scale.labels.single", Single, teacher=True),
        Kind(HARD, "ltdd_scale.labels.hard", None, teacher=False),
        Kind("learned", "ltdd_scale.labels.learned", None, teacher=False, of_set=True),
    )
}


def baseline(kind: str) -> str:
    """The labels of real images beside a distilled set with labels of `kind`: the same, or the
    classes where only the set has such."""
    return HARD if KINDS[kind].of_set else kind
