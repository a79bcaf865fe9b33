"""The protocol of the field: students trained from scratch on the set, judged once.

A student is one unit of work: (set, labels, net, seed). Sets are the distilled images, the images
they started from, random real images of the same IPC, and the whole long-tailed set. Nothing is
chosen on the test set: the last weights count.
"""

from __future__ import annotations

from typing import Any

from ltdd_scale.data.settings import Seen
from ltdd_scale.judging.contract import Protocol, Roles
from ltdd_scale.judging.settings import Training
from ltdd_scale.labels.catalog import HARD, KINDS, baseline
from ltdd_scale.labels.stage import reads as label_reads
from ltdd_scale.results import WHOLE_SETS, Student
from ltdd_scale.stage import Division, Section, Stage, places


def _cells(config: Any, roles: Roles) -> list[tuple[str, str]]:
    """(set, labels) of all students, the configured ones first.

    Real images have no learned labels: beside a set with such, they are trained on with classes.
    """
    settings, kind = config.evaluate, config.relabel.labels
    cells = [("distilled", kind)]
    if settings.random:
        cells.append(("random", baseline(kind)))
    if settings.full_epochs:
        cells.append(("full", "online" if KINDS[kind].teacher else HARD))
    if settings.matrix:
        sets = [s for s in ("random", "initial", "distilled") if s != "initial" or roles.initial]
        brought = [y for y in KINDS if KINDS[y].of_set]
        kinds = dict.fromkeys((*settings.matrix_labels, *brought))
        every = [(s, y) for s in sets for y in kinds if _has(s, y, roles)]
        cells += [cell for cell in every if cell not in cells]
    return cells


def _has(which: str, labels: str, roles: Roles) -> bool:
    """Whether images of the set `which` can have such labels."""
    return not KINDS[labels].of_set or (which == "distilled" and roles.learned)


def students(config: Any, roles: Roles) -> list[tuple[Student, int]]:
    """All students that the config asks for, and their epochs.

    The plain network comes last: a student of the whole set with hard labels, trained once.
    """
    settings, out = config.evaluate, []
    for net in settings.nets:
        for which, labels in _cells(config, roles):
            epochs = settings.full_epochs if which == "full" else settings.epochs
            seeds = range(config.seed, config.seed + settings.seeds)
            out += [(Student(which, labels, net, seed), epochs) for seed in seeds]
    if settings.plain == "own":
        plain = Student("plain", HARD, settings.nets[0], config.seed)
        out.append((plain, settings.plain_epochs))
    return out


def needs_teacher(config: Any) -> bool:
    kinds = {labels for _, labels in _cells(config, Roles("distilled", "initial"))}
    return config.evaluate.plain == "expert" or any(KINDS[k].teacher for k in kinds)


def _student(student: Student, epochs: int, config: Any, roles: Roles) -> Stage:
    inputs = {"shard": "shard"}
    if KINDS[student.labels].teacher:
        inputs["teacher"] = "teacher"
    if student.set in ("distilled", "initial"):
        inputs["images"] = roles.distilled if student.set == "distilled" else roles.initial
    if student.set == "distilled" and student.labels == config.relabel.labels:
        inputs["labels"] = roles.labels
    small = student.set not in WHOLE_SETS
    return Stage(
        name=student.name,
        kind="student",
        version=5,
        run="ltdd_scale.judging.student:run",
        reads={
            "training": Section("evaluate", Training),
            **places("evaluate.width", "evaluate.norm", "evaluate.split"),
            **(places("ipc") if small else {}),
            **label_reads(student.labels),
            **places("seed", "runtime.precision"),
            "images": Section("data", Seen),
        },
        given={"student": student.to_dict(), "epochs": epochs},
        inputs=inputs,
        division=Division.UNITS,
        group="students",
        cost="ltdd_scale.judging.cost:student",
        check="ltdd_scale.judging.student:check",
        help="train and judge students",
    )


def stages(config: Any, roles: Roles) -> tuple[Stage, ...]:
    units = [_student(s, epochs, config, roles) for s, epochs in students(config, roles)]
    judged = {title: stage for title, (stage, _) in roles.judged.items()}
    verdict = Stage(
        name="evaluate",
        kind="evaluate",
        version=2,
        run="ltdd_scale.judging.verdict:run",
        reads={
            **places("seed", "relabel.labels", "evaluate.split", "evaluate.matrix"),
            **places("evaluate.plain", "runtime.precision"),
            # Which head of the teacher is its plain one.
            **(places("train.debias") if config.evaluate.plain == "expert" else {}),
            "images": Section("data", Seen),
        },
        given={"judged": {title: list(where) for title, where in roles.judged.items()}},
        inputs={"shard": "shard", **judged, **{s.name: s.name for s in units}},
        division=Division.ONE,
        cost="ltdd_scale.judging.cost:verdict",
        help="train and judge students",
    )
    return (*units, verdict)


SINGLE_STAGE = Protocol("single_stage", stages, needs_teacher)
