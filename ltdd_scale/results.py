"""The records of a result: a student, and the numbers that everyone shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Of every judged network, in per cent. `balanced` is the mean over classes of their accuracy.
NUMBERS = ("top1", "balanced", "top5", "class_std", "many", "medium", "few")
SETS = ("random", "initial", "distilled", "chosen", "full", "plain")
CHOSEN = "chosen"  # the best of the first three, by validation images
WHOLE_SETS = ("full", "plain")  # all images of the long-tailed set, whatever the IPC
# (set, labels) that stands in every result, whatever the labels: random real images with classes.
RANDOM_PLAIN = ("random", "hard")
RANDOM_PLAIN_TITLE = "random real, plain labels"
ADJUSTED = "logit-adjusted"  # how titles of plain networks after logit adjustment end
TEACHER = "teacher"  # the title of the teacher among the judged networks
OBSERVER = "observer"
BOTH = "teacher + observer"  # that of the mean of their logits, where both label together
LABELLERS = {BOTH: "teacher and observer together", TEACHER: "the teacher"}  # title → in a sentence
SOFTMAX = "softmax"  # in set.json: what of single labels is mixed where CutMix mixes images
GROUPS_PART = "groups"  # the part of a student that tells groups of classes apart
# Candidates of two_stage.first and two_stage.second that are trained for it: on which set.
TRAINED = {"trained_whole": "plain", "trained_distilled": "distilled", "trained_random": "random"}


def labels_of(which: str, summary: Mapping[str, Any]) -> str:
    """The labels with which the set `which` stands in a result, `summary` being the verdict's: the
    configured ones. Real images, which have no learned labels, have those of the baseline."""
    configured = summary["labels"]
    return configured if which in ("distilled", CHOSEN) else summary.get("baseline", configured)


def plain_name(title: str) -> str:
    """What the network of a plain entry is called in a sentence, from the title of the entry, such
    as "teacher, prior put back, logit-adjusted"; logit adjustment is not told."""
    name, _, how = title.removesuffix(f", {ADJUSTED}").partition(", ")
    if name == "plain":
        return "the plain network"
    return f"the {name} with the {how}" if how else f"the {name}"


def is_adjusted(title: str) -> bool:
    """Whether the plain entry of this title is a network after logit adjustment."""
    return title.endswith(ADJUSTED)


@dataclass(frozen=True)
class Student:
    """One network trained from scratch: on which images, with which labels, which net and seed.

    `part` is what it tells apart: nothing stands for all classes, `GROUPS_PART` for groups of
    classes, "g0", "g1", … for the classes of one group.
    """

    set: str  # one of SETS
    labels: str  # the name of a label kind
    net: str
    seed: int
    part: str = ""

    @property
    def name(self) -> str:
        """The name of its stage: ``student/distilled-online-convnet3-s0``."""
        part = f"-{self.part}" if self.part else ""
        return f"student/{self.set}-{self.labels}-{self.net}-s{self.seed}{part}"

    @property
    def title(self) -> str:
        part = f" {self.part}" if self.part else ""
        return f"{self.set} {self.labels} {self.net} seed {self.seed}{part}"

    def to_dict(self) -> dict[str, Any]:
        """Its fields; `part` is left out where it is all classes."""
        fields = dataclasses.asdict(self)
        return fields if self.part else {k: v for k, v in fields.items() if k != "part"}
