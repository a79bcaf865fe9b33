"""The protocol of the field: students trained from scratch on the set, judged once.

A student is one unit of work: (set, labels, net, seed). Sets are the distilled images, the images
they started from, random real images of the same IPC, and the whole long-tailed set. Nothing is
chosen on the test set: the last weights count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ltdd_scale.data.stage import real, seen
from ltdd_scale.experts.settings import Priors, is_observer
from ltdd_scale.judging.contract import Protocol, Roles
from ltdd_scale.judging.settings import Steps, Training
from ltdd_scale.labels.catalog import HARD, KINDS, SINGLE, baseline
from ltdd_scale.labels.stage import labellers, more_labellers
from ltdd_scale.labels.stage import reads as label_reads
from ltdd_scale.results import CHOSEN, RANDOM_PLAIN, WHOLE_SETS, Student
from ltdd_scale.stage import Division, Section, Stage, places


def cells(config: Any, roles: Roles) -> list[tuple[str, str]]:
    """(set, labels) of all students, the configured ones first.

    Real images have no learned labels: beside a set with such, they are trained on with classes.
    Random real images always have a student with classes: labels of a teacher may cost accuracy.
    """
    settings, kind = config.evaluate, config.relabel.labels
    found = [("distilled", kind), *([(CHOSEN, kind)] if roles.chosen else [])]
    if settings.random:
        found += dict.fromkeys([("random", baseline(kind)), RANDOM_PLAIN])
    if settings.full_epochs:
        found.append(("full", "online" if KINDS[kind].teacher else HARD))
    if settings.matrix:
        sets = [s for s in ("random", "initial", "distilled") if s != "initial" or roles.initial]
        brought = [y for y in KINDS if KINDS[y].of_set]
        kinds = dict.fromkeys((*settings.matrix_labels, *brought))
        every = [(s, y) for s in sets for y in kinds if _has(s, y, roles)]
        found += [cell for cell in every if cell not in found]
    return found


def _has(which: str, labels: str, roles: Roles) -> bool:
    """Whether images of the set `which` can have such labels."""
    return not KINDS[labels].of_set or (which == "distilled" and roles.learned)


def students(config: Any, roles: Roles) -> list[tuple[Student, int]]:
    """All students that the config asks for, and their epochs.

    The plain network comes last: a student of the whole set with hard labels, trained once.
    """
    once = 1 if config.evaluate.plain == "own" else 0
    return ordinary(config, roles) + plain(config, once)


def ordinary(config: Any, roles: Roles) -> list[tuple[Student, int]]:
    """The students without the plain network."""
    settings, out = config.evaluate, []
    for net in settings.nets:
        for which, labels in cells(config, roles):
            epochs = settings.full_epochs if which == "full" else settings.epochs
            seeds = range(config.seed, config.seed + settings.seeds)
            out += [(Student(which, labels, net, seed), epochs) for seed in seeds]
    return out


def plain(config: Any, num_seeds: int) -> list[tuple[Student, int]]:
    """The plain network on the whole set, of as many seeds."""
    net, epochs = config.evaluate.nets[0], config.evaluate.plain_epochs
    seeds = range(config.seed, config.seed + num_seeds)
    return [(Student("plain", HARD, net, seed), epochs) for seed in seeds]


def needs_teacher(config: Any) -> bool:
    return config.evaluate.plain == "expert" or has_taught(config)


def has_taught(config: Any) -> bool:
    """Whether any student has labels of a teacher."""
    kinds = {labels for _, labels in cells(config, Roles("distilled", "initial"))}
    return any(KINDS[k].teacher for k in kinds)


def unit(student: Student, epochs: int, config: Any, roles: Roles) -> Stage:
    """The record of one student. One of a part of the classes is in a group of its own: it needs
    the groups, and these need another student."""
    inputs = real(config)
    given: dict[str, Any] = {"student": student.to_dict(), "epochs": epochs}
    if KINDS[student.labels].teacher:
        inputs |= labellers(config)
        given |= more_labellers(config)
    where = {"distilled": roles.distilled, "initial": roles.initial, CHOSEN: roles.chosen}
    if student.set in where:
        inputs["images"] = where[student.set]
    if student.set == "distilled" and student.labels == config.relabel.labels:
        inputs["labels"] = roles.labels
    if student.set == CHOSEN:
        inputs["labels"] = roles.chosen_labels
        of_kind = {which for which, labels in cells(config, roles) if labels == student.labels}
        given["twins"] = sorted(of_kind & {"distilled", "initial", "random"})
    if student.part:
        inputs["grouping"] = "grouping"
        given["groups"] = groups_of(config)
    # What the work costs. The inputs' fingerprints hold these already.
    teacher = {f"teacher_{name}": f"teacher.{name}" for name in ("net", "width", "norm")}
    small = student.set not in WHOLE_SETS
    by_kl = student.labels == SINGLE and config.evaluate.soft_loss == "kl"
    return Stage(
        name=student.name,
        kind="student",
        version=7 if by_kl else 6,  # 7: of images that CutMix mixes, the softmax is mixed
        run="ltdd_scale.judging.student:run",
        reads={
            # With classes nothing is learned from a soft label, and no view is drawn by the
            # config's seed: such students are the same whatever these are.
            **(
                {"training": Section("evaluate", Steps)}
                if student.labels == HARD
                else {"training": Section("evaluate", Training), **places("seed")}
            ),
            **places("evaluate.width", "evaluate.norm", "evaluate.split"),
            **(places("ipc") if small else {}),
            **label_reads(student.labels),
            **(teacher if KINDS[student.labels].teacher else {}),
            **places("runtime.precision"),
            **seen(config),
        },
        given=given,
        inputs=inputs,
        division=Division.UNITS,
        group="group-students" if student.part else "students",
        cost="ltdd_scale.judging.cost:student",
        check="ltdd_scale.judging.student:check",
        help="train students of groups of classes" if student.part else "train and judge students",
    )


def groups_of(config: Any) -> int:
    """The number of groups of classes; 0 where it is not known before they are found."""
    given = config.two_stage.criterion == "given"
    return len(config.two_stage.given) if given else config.two_stage.groups


def first_of(which: str, found: list[tuple[Student, int]]) -> Student | None:
    """The first student of a set: of the configured labels, the first net and the first seed."""
    return next((s for s, _ in found if s.set == which and not s.part), None)


def embedding(config: Any, found: list[tuple[Student, int]]) -> tuple[Stage, ...]:
    """The stage that draws judged images by the features of networks, where it is asked for."""
    if not config.evaluate.embedding:
        return ()
    shown = {
        title: first.name
        for title, which in (("plain, whole set", "plain"), ("distilled", "distilled"))
        if (first := first_of(which, found))
    }
    stage = Stage(
        name="embedding",
        kind="embedding",
        version=1,
        run="ltdd_scale.judging.embedding:run",
        reads={**places("evaluate.split", "runtime.precision"), **seen(config)},
        given={"titles": list(shown)},
        inputs={**real(config), **shown},
        division=Division.ONE,
        help="draw the judged images by their features (t-SNE)",
    )
    return (stage,)


def stages(config: Any, roles: Roles) -> tuple[Stage, ...]:
    found = students(config, roles)
    units = [unit(student, epochs, config, roles) for student, epochs in found]
    drawn = embedding(config, found)
    return (*units, *drawn, verdict(config, roles, (*units, *drawn), {}))


def verdict(config: Any, roles: Roles, above: tuple[Stage, ...], more: Mapping[str, Any]) -> Stage:
    """The last stage, which reads all stages `above`. `more`: what it reads of the config beside
    what every verdict does."""
    settings = config.evaluate
    trained = "observer" if is_observer(config) else "teacher"
    judged = {title: stage for title, (stage, _) in roles.judged.items()}
    return Stage(
        name="evaluate",
        kind="evaluate",
        version=7,  # 7: of a teacher that saw re-sampled images
        run="ltdd_scale.judging.verdict:run",
        reads={
            **places("seed", "relabel.labels", "evaluate.split", "evaluate.matrix"),
            **places("evaluate.plain", "runtime.precision", "relabel.labeller"),
            # What labels cost.
            **places("ipc", "relabel.topk", "evaluate.epochs", "evaluate.full_epochs"),
            "label_epochs": "relabel.epochs",
            # What the teacher would say, had it not been balanced.
            **(
                {"trained": Section(trained, Priors), **places(f"{trained}.recipe")}
                if settings.plain == "expert"
                else {}
            ),
            **more,
            **seen(config),
        },
        given={"judged": {title: list(where) for title, where in roles.judged.items()}},
        inputs={
            **real(config),
            **judged,
            **({"choose": roles.chosen} if roles.chosen else {}),
            **{s.name: s.name for s in above},
        },
        division=Division.ONE,
        cost="ltdd_scale.judging.cost:verdict",
        help="train and judge students",
    )


SINGLE_STAGE = Protocol("single_stage", stages, needs_teacher)
