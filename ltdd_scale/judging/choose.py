"""The records of the choice between images: short students on validation images tell, for each kind
of label, whether the method's images are worth more than those they started from, or than random
real ones. What leaves the house is what was chosen."""

from __future__ import annotations

import dataclasses
from typing import Any

from ltdd_scale.data.stage import real, seen
from ltdd_scale.errors import UserError
from ltdd_scale.judging import single_stage
from ltdd_scale.judging.contract import Roles
from ltdd_scale.labels.catalog import KINDS
from ltdd_scale.results import Student
from ltdd_scale.stage import Division, Stage, places

CHOOSE = "choose"


def wanted(config: Any) -> bool:
    """Whether images are chosen. Labels that a set brings are of its images alone."""
    how = config.choose.how
    return how == "always" or (how == "auto" and held_out(config) and not _own_labels(config))


def held_out(config: Any) -> bool:
    """Whether the config is known to have validation images. Shards are opened later only."""
    data = config.data
    return bool(data.val_per_class or data.val_fraction or data.validated)


def _own_labels(config: Any) -> bool:
    return KINDS[config.relabel.labels].of_set


def check(config: Any) -> None:
    """Raise `UserError` where images are to be chosen, and cannot be."""
    if config.choose.how != "always":
        return
    if not held_out(config) and config.data.source != "shards":
        raise UserError(
            "choose.how=always needs validation images: set data.val_fraction, "
            "data.val_per_class, data.val_list or data.val_folder; or choose.how=auto"
        )
    if _own_labels(config):
        raise UserError(
            f"choose.how=always: labels of the kind {config.relabel.labels} belong to the "
            "distilled images, so there is nothing to choose from; set choose.how=auto"
        )


def kinds(config: Any) -> list[str]:
    """The kinds of labels that images are chosen for, the configured one first."""
    more = config.evaluate.matrix_labels if config.evaluate.matrix else []
    found = dict.fromkeys([config.relabel.labels, *more])
    return [kind for kind in found if not KINDS[kind].of_set]


def length(config: Any) -> dict[str, int]:
    """Of a trial. After too few steps students tell noise: those of small sets have more epochs
    (`lengths.epochs_of`), but never more than half of a student's, or `choose.share` of them."""
    whole = config.evaluate.epochs
    return {
        "epochs": max(1, round(whole * config.choose.share)),
        "least_steps": config.choose.steps,
        "most": max(1, whole // 2),
    }


def trials(config: Any, roles: Roles) -> list[Stage]:
    """The short students: records of ordinary ones, judged on validation images."""
    sets = ["distilled", *(["initial"] if roles.initial else []), "random"]
    net, out = config.evaluate.nets[0], []
    for kind in kinds(config):
        for which in sets:
            for seed in range(config.seed, config.seed + config.choose.seeds):
                who = Student(which, kind, net, seed)
                unit = single_stage.unit(who, config.evaluate.epochs, config, roles)
                reads = {k: v for k, v in unit.reads.items() if k != "split"}
                # Labels that relabel has made are of the students' epochs: these make their own.
                inputs = {k: v for k, v in unit.inputs.items() if k != "labels"}
                out.append(
                    dataclasses.replace(
                        unit,
                        name=who.name.replace("student/", "trial/", 1),
                        reads=reads,
                        inputs=inputs,
                        given={**unit.given, **length(config), "split": "val"},
                        group="trials",
                        help="train short students that tell which images to keep",
                    )
                )
    return out


def stages(config: Any, roles: Roles) -> tuple[Stage, ...]:
    """The trials and the choice; nothing where images are not chosen."""
    if not wanted(config):
        return ()
    tried = trials(config, roles)
    initial = {"initial": roles.initial} if roles.initial else {}
    choice = Stage(
        name=CHOOSE,
        kind="choose",
        version=5,  # 5: that validation images are few counts as noise
        run="ltdd_scale.judging.choice:run",
        reads={**places("seed", "ipc"), **seen(config)},
        given={"kinds": kinds(config)},
        inputs={
            **real(config),
            "distilled": roles.distilled,
            **initial,
            **{stage.name: stage.name for stage in tried},
        },
        division=Division.ONE,
        help="choose the images by validation",
    )
    return (*tried, choice)
