"""The protocol of "Two-stage": first the group of an image, then its class in the group.

All of `single_stage`, the plain network of every seed, groups of classes, and students of groups.
Everything else is made of saved logits (`routing.py`), so that all pairs of a first and a second
stage stand in one table. Nothing is chosen on the test set.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from ltdd_scale.data.stage import real, seen
from ltdd_scale.errors import UserError
from ltdd_scale.judging import single_stage
from ltdd_scale.judging.contract import Protocol, Roles
from ltdd_scale.judging.settings import ADJUSTED, Grouping, TwoStage
from ltdd_scale.labels.catalog import HARD, KINDS, baseline
from ltdd_scale.results import GROUPS_PART, TRAINED, Student
from ltdd_scale.stage import Division, Section, Stage, places

NETWORKS = {  # of two_stage.network: as grouping.json calls them
    "plain": "plain, whole set",
    "teacher": "teacher",
    "observer": "observer",
    "distilled": "distilled",
}


def students(config: Any, roles: Roles) -> list[tuple[Student, int]]:
    """All students of all classes, and their epochs: the plain network has all seeds too."""
    wanted = config.evaluate.seeds if config.evaluate.plain != "none" else 0
    return single_stage.ordinary(config, roles) + single_stage.plain(config, wanted)


def parts(config: Any) -> list[tuple[Student, int]]:
    """Students of parts of the classes, and their epochs: group classifiers, then in-group ones.

    They have the first net only.
    """
    settings, asked = config.evaluate, config.two_stage
    within = [f"g{g}" for g in range(single_stage.groups_of(config))]
    wanted = [(name, [GROUPS_PART]) for name in asked.first if name in TRAINED]
    wanted += [(name, within) for name in asked.second if name in TRAINED]
    out: dict[Student, int] = {}
    for name, kinds in wanted:
        which = TRAINED[name]
        epochs = settings.plain_epochs if which == "plain" else settings.epochs
        for seed in range(config.seed, config.seed + settings.seeds):
            for part in kinds:
                labels = _labels(which, config)
                out[Student(which, labels, settings.nets[0], seed, part)] = epochs
    return list(out.items())


def _labels(which: str, config: Any) -> str:
    """The labels of students of parts: the configured ones; classes on the whole set."""
    configured = config.relabel.labels
    return {"plain": HARD, "distilled": configured, "random": baseline(configured)}[which]


def needs_teacher(config: Any) -> bool:
    asked = {*config.two_stage.first, *config.two_stage.second}
    kinds = {_labels(TRAINED[name], config) for name in asked if name in TRAINED}
    return (
        config.two_stage.network == "teacher"
        or single_stage.has_taught(config)
        or any(KINDS[kind].teacher for kind in kinds)
    )


def needs_observer(config: Any) -> bool:
    return config.two_stage.network == "observer"


def _grouping(config: Any, found: list[tuple[Student, int]]) -> Stage:
    network = config.two_stage.network
    student = single_stage.first_of(network, found)
    return Stage(
        name="grouping",
        kind="grouping",
        version=1,
        run="ltdd_scale.judging.grouping:run",
        reads={
            "grouping": Section("two_stage", Grouping),
            **places("seed", "evaluate.split", "runtime.precision"),
            **seen(config),
        },
        given={"title": NETWORKS[network]},
        inputs={**real(config), "network": student.name if student else network},
        division=Division.ONE,
        cost="ltdd_scale.judging.cost:grouping",
        help="group the classes",
    )


def stages(config: Any, roles: Roles) -> tuple[Stage, ...]:
    found = students(config, roles)
    units = [single_stage.unit(s, epochs, config, roles) for s, epochs in found]
    grouping = _grouping(config, found)
    within = [single_stage.unit(s, epochs, config, roles) for s, epochs in parts(config)]
    drawn = single_stage.embedding(config, found)
    above = (*units, grouping, *within, *drawn)
    asked = places("two_stage.first", "two_stage.second")
    return (*above, single_stage.verdict(config, roles, above, asked))


def check(config: Any, experts: Collection[str] = ()) -> list[str]:
    """See `Protocol`."""
    asked, warnings = config.two_stage, []
    trained = [name for name in asked.second if name in TRAINED]
    missing = _missing(config, experts)
    for key, names in (("first", asked.first), ("second", asked.second)):
        if not names:
            raise UserError(f"two_stage.{key}: name at least one, such as [distilled]")
        warnings += _left_out(key, names, missing)
    if asked.groups == 1:
        raise UserError("two_stage.groups: one group tells nothing apart; 2 or more, or 0")
    _check_criterion(asked, warnings)
    if not single_stage.groups_of(config) and trained:
        raise UserError(
            f"two_stage.groups=0 (chosen by the silhouette): how many students {trained[0]} in "
            "two_stage.second is, is not known before; set two_stage.groups, or leave trained_… out"
        )
    stored = [n for n in trained if KINDS[_labels(TRAINED[n], config)].views]
    if stored:
        raise UserError(
            f"two_stage.second: {stored[0]} cannot have relabel.labels={config.relabel.labels}, "
            "which belong to views of the whole set: choose other labels, or leave trained_… out"
        )
    if asked.network == "plain" and config.evaluate.plain == "none":
        raise UserError(
            "two_stage.network=plain needs the plain network: set evaluate.plain=own, or another "
            "two_stage.network"
        )
    if config.data.zca and asked.network == "observer":
        raise UserError("two_stage.network=observer: it sees no whitened images; set another one")
    if config.evaluate.plain == "expert":
        warnings.append(
            "evaluate.plain=expert has no effect with protocol=two_stage: plain networks are "
            "trained all the same; set own or none"
        )
    if len(config.evaluate.nets) > 1:
        warnings.append(f"two_stage judges pairs of {config.evaluate.nets[0]} only, the first net")
    return warnings


def _missing(config: Any, experts: Collection[str]) -> dict[str, str]:
    """Networks that the run does not have: name → what they need."""
    settings, kind = config.evaluate, config.relabel.labels
    cells = single_stage.cells(config, Roles("distilled", "initial"))
    teacher = "teacher" in experts or KINDS[kind].teacher or needs_teacher(config)
    known = {
        "plain": (settings.plain != "none", "evaluate.plain=own"),
        "random": (("random", baseline(kind)) in cells, "evaluate.random=true"),
        "full": (settings.full_epochs > 0, "evaluate.full_epochs"),
        "teacher": (teacher, "labels of a teacher, or two_stage.network=teacher"),
    }
    return {name: needs for name, (there, needs) in known.items() if not there}


def _left_out(key: str, names: Sequence[str], missing: dict[str, str]) -> list[str]:
    """A warning of the candidates `names` that the run does not have; none of the default ones,
    which are for every run. Raises `UserError` where no other is left."""
    needs = {name: missing.get(name.removesuffix(ADJUSTED), "") for name in names}
    needs = {name: text for name, text in needs.items() if text}
    shown = ", ".join(f"{name} (it needs {text})" for name, text in needs.items())
    if len(needs) == len(set(names)):
        raise UserError(f"two_stage.{key}: the run has none of them: {shown}")
    if not needs or list(names) == getattr(TwoStage(), key):
        return []
    return [f"two_stage.{key}: the run does not have {shown}: left out"]


def _check_criterion(asked: TwoStage, warnings: list[str]) -> None:
    if asked.criterion == "given":
        if len(asked.given) < 2:
            raise UserError("two_stage.given: criterion=given needs two lists of classes or more")
        if asked.groups not in (TwoStage().groups, len(asked.given)):
            warnings.append("two_stage.groups has no effect with two_stage.criterion=given")
    elif asked.given:
        warnings.append(f"two_stage.given has no effect with criterion={asked.criterion}")
    if asked.criterion != "maxcut" and asked.centres != TwoStage().centres:
        warnings.append(f"two_stage.centres has no effect with criterion={asked.criterion}")
    if asked.criterion == "given" and asked.smallest != TwoStage().smallest:
        warnings.append("two_stage.smallest has no effect with criterion=given")
    if asked.criterion == "random" and not asked.groups:
        raise UserError("two_stage.criterion=random: set two_stage.groups to 2 or more")


TWO_STAGE = Protocol(
    "two_stage",
    stages,
    needs_teacher,
    needs_observer,
    sections={"two_stage": TwoStage},
    check=check,
    plain=True,
)
