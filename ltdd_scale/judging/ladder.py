"""What a teacher has to be above: networks on the same test images that cost no teacher.

A teacher below one of them passes its mistakes on to all who learn from it, so the verdict says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ltdd_scale.results import (
    LABELLERS,
    NUMBERS,
    RANDOM_PLAIN,
    RANDOM_PLAIN_TITLE,
    TEACHER,
    is_adjusted,
    plain_name,
)

Rung = dict[str, Any]
KEPT = ("num_seeds", *(name for n in NUMBERS for name in (n, f"{n}_std")))


def rungs(summary: Mapping[str, Any]) -> list[Rung]:
    """The ladder out of the verdict's `summary`: "plain", "students" and "experts" of it.

    In this order, each where the run has it: the plain network on the whole set (or the teacher's
    plain head, which stands in), the same after logit adjustment, random real images with classes
    (the first net), the teacher, or teacher and observer where both label together. Each has
    "title", "what" (the same in a sentence), "net" and the numbers of `metrics.mean_of`. One
    network alone has one seed and no spread.
    """
    out = []
    for entry in summary.get("plain", []):
        after = " after logit adjustment" if is_adjusted(entry["title"]) else ""
        out.append(_rung(entry["title"], f"{plain_name(entry['title'])}{after}", entry))
    for entry in summary["students"]:
        if (entry["set"], entry["labels"]) == RANDOM_PLAIN:
            what = "random real images with plain labels"
            out.append(_rung(RANDOM_PLAIN_TITLE, what, entry))
            break
    for title, what in LABELLERS.items():
        if title in summary["experts"]:
            out.append(_rung(title, what, summary["experts"][title]))
            break
    return out


def warnings(ladder: Sequence[Rung], labelled: bool) -> list[str]:
    """A sentence where the teacher of a ladder (see `rungs`) is not above all other rungs: on the
    best of them. Without a teacher, or without another rung, there is nothing to say.

    Balanced accuracies count, as they are shown: with one decimal. `labelled`: whether students
    learn labels of the teacher; otherwise only images were made with it.
    """
    teachers = [rung for rung in ladder if rung["title"] in LABELLERS]
    others = [rung for rung in ladder if rung["title"] not in LABELLERS]
    if not teachers or not others:
        return []
    best = max(others, key=lambda rung: rung["balanced"])
    own, other = (f"{rung['balanced']:.1f}" for rung in (teachers[0], best))
    if float(own) > float(other):
        return []
    both = teachers[0]["title"] != TEACHER
    than = f"{'are' if both else 'is'} {'no better' if own == other else 'worse'} than"
    its, it = ("their", "them") if both else ("its", "it")
    cost = (
        f"{its} labels cost accuracy" if labelled else f"what is made with {it} may cost accuracy"
    )
    return [f"{teachers[0]['what']} ({own}) {than} {best['what']} ({other}): {cost}"]


def _rung(title: str, what: str, entry: Mapping[str, Any]) -> Rung:
    numbers = {"num_seeds": 1, **{f"{n}_std": None for n in NUMBERS}, **entry}
    return {"title": title, "what": what, "net": entry["net"], **{k: numbers[k] for k in KEPT}}
