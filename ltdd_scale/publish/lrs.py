"""The label-robust score of a distilled set, from accuracies that were measured anyway.

The score is DD-Ranking's (arXiv 2505.13300). Two things differ from its package. Accuracies are
fractions here, as the formula's bounds demand: the package (0.2.0) puts per cent into the
exponential, so that one point weighs as much as a hundred should. And the random images are drawn
from the long-tailed training set, students are judged by their last weights, and no test image
chooses anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ltdd_scale.publish.kept import CALLED, OWN, kept
from ltdd_scale.results import CHOSEN, labels_of

HARD = "hard"
PLAIN = "plain, whole set"  # the title of the network on the whole set with its classes
WEIGHT = 0.5


@dataclass(frozen=True)
class Accuracies:
    """What the score needs, all of one network, as fractions in [0, 1]: the whole real set with
    classes, the exported set with classes, and both small sets judged in the set's own way."""

    whole_hard: float
    distilled_hard: float
    distilled_own: float
    random_own: float

    @property
    def recovery(self) -> float:
        """Hard-label recovery: what is missing to the whole set. Small is good."""
        return self.whole_hard - self.distilled_hard

    @property
    def improvement(self) -> float:
        """Improvement over random real images. Large is good."""
        return self.distilled_own - self.random_own

    def score(self, weight: float = WEIGHT) -> float:
        """(exp α − exp −1) / (exp 1 − exp −1) with α = w·IOR − (1 − w)·HLR, in [0, 1]."""
        alpha = weight * self.improvement - (1 - weight) * self.recovery
        return (math.exp(alpha) - math.exp(-1)) / (math.exp(1) - math.exp(-1))


def of_results(results: Mapping[str, Any]) -> dict[str, Accuracies]:
    """net → accuracies (means over seeds) for every network that has been run in all four ways.

    They are of the images that are exported: of the chosen ones, where images were chosen.
    """
    summary = results["summary"]
    number = "top1" if summary.get("balanced_test", True) else "balanced"
    cells = {(e["set"], e["labels"], e["net"]): e[number] for e in summary["students"]}
    whole = {e["net"]: e[number] for e in summary.get("plain", []) if e["title"] == PLAIN}
    chosen = kept(summary)
    own = (CHOSEN if chosen else OWN, labels_of(OWN, summary))
    random = ("random", labels_of("random", summary))
    hard = own if own[1] == HARD else (chosen or OWN, HARD)
    found = {}
    for net, accuracy in whole.items():
        wanted = [(*hard, net), (*own, net), (*random, net)]
        values = [v for v in (accuracy, *map(cells.get, wanted)) if v is not None]
        if len(values) == 1 + len(wanted):
            found[net] = Accuracies(*(v / 100 for v in values))
    return found


def text(results: Mapping[str, Any]) -> str:
    """A paragraph for a table's foot; empty where the students that it needs were not run."""
    lines = []
    for net, a in of_results(results).items():
        lines.append(
            f"Label-robust score ({net}): **{a.score():.3f}** of 1, from HLR "
            f"{100 * a.recovery:+.1f} and IOR {100 * a.improvement:+.1f} points."
        )
    if not lines:
        return ""
    summary = results["summary"]
    balanced = "" if summary.get("balanced_test", True) else "Accuracies are balanced ones. "
    chosen = kept(summary)
    images = f"exported set ({CALLED[chosen]})" if chosen not in ("", OWN) else "distilled set"
    about = (
        "LRS = (exp α − exp −1) / (exp 1 − exp −1) with α = ½·IOR − ½·HLR, accuracies as "
        f"fractions; HLR: whole long-tailed set minus {images}, both with plain classes; IOR: "
        f"{images} minus random real images ({labels_of('distilled', summary)} against "
        f"{labels_of('random', summary)} labels). IOR = HLR gives 0.269. "
        f"{balanced}Last weights; no choice on test images."
    )
    return "\n".join([*lines, "", about])
