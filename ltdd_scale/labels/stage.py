"""The record of the stage "relabel"."""

from __future__ import annotations

from typing import Any

from ltdd_scale.data.settings import Seen
from ltdd_scale.labels.catalog import KINDS, SINGLE
from ltdd_scale.labels.settings import Single, Views
from ltdd_scale.stage import Section, Stage, places


def reads(kind: str) -> dict[str, Any]:
    """What labels of `kind` depend on, wherever they are made."""
    found = KINDS[kind]
    return {"relabel": Section("relabel", found.settings)} if found.settings else {}


def labellers(config: Any) -> dict[str, str]:
    """Inputs of a stage whose images are labelled by networks: the teacher, and the observer where
    both label together."""
    names = ("teacher", "observer") if config.relabel.labeller == "both" else ("teacher",)
    return {name: name for name in names}


def more_labellers(config: Any) -> dict[str, int]:
    """How many networks pass over an image that is labelled, where it is not the teacher alone:
    what that costs."""
    names = labellers(config)
    return {"labellers": len(names)} if len(names) > 1 else {}


def stage(config: Any, distilled: str, name: str = "relabel") -> Stage:
    """Labels of the distilled set, which lies in the folder of the stage `distilled`."""
    kind = KINDS[config.relabel.labels]
    single = kind.name == SINGLE or kind.of_views  # the kind itself, or labels beside it
    drawn = kind.views or (single and config.relabel.views > 1)
    by_kl = kind.views and config.relabel.topk and config.evaluate.soft_loss == "kl"
    # What the work costs. The inputs' fingerprints hold these already.
    size = {**places("ipc"), **places("teacher.net", "teacher.width", "teacher.norm")}
    return Stage(
        name=name,
        kind="relabel",
        version=4 if kind.of_views else 3,  # 4: with single labels beside them
        run="ltdd_scale.labels.relabel:run",
        reads={
            **reads(kind.name),
            **({"views": Section("evaluate", Views)} if drawn else {}),
            **({"student_epochs": "evaluate.epochs"} if kind.views else {}),
            **(places("evaluate.temperature") if by_kl else {}),
            **({"single": Section("relabel", Single)} if kind.of_views else {}),
            **(size if kind.teacher else places("ipc") if kind.of_set else {}),
            **places("seed", "runtime.precision"),
            "images": Section("data", Seen),
        },
        given={"labels": kind.name, **(more_labellers(config) if kind.teacher else {})},
        inputs={
            "shard": "shard",
            "distilled": distilled,
            **(labellers(config) if kind.teacher else {}),
        },
        cost="ltdd_scale.labels.cost:relabel",
        help=f"make the labels of the {'distilled' if name == 'relabel' else 'chosen'} images",
    )
