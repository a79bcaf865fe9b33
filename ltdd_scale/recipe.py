"""Which stages a config asks for, from the shards to the verdict. The only file that knows all."""

from __future__ import annotations

from typing import Any

from ltdd_scale.config.root import Config
from ltdd_scale.data.stage import stage as shard
from ltdd_scale.data.stage import whiten
from ltdd_scale.experts.settings import OWN, is_observer
from ltdd_scale.experts.stage import ROLES
from ltdd_scale.experts.stage import stage as expert
from ltdd_scale.judging import choose
from ltdd_scale.judging.catalog import PROTOCOLS
from ltdd_scale.judging.contract import Roles
from ltdd_scale.labels.catalog import KINDS
from ltdd_scale.labels.stage import labellers
from ltdd_scale.labels.stage import stage as relabel
from ltdd_scale.methods.catalog import METHODS
from ltdd_scale.stage import Stage

SHARD, STUDENTS, VERDICT, REPORT = "shard", "students", "evaluate", "report"
CHOSEN_LABELS = "relabel-chosen"


def stages(config: Any, source: str) -> tuple[Stage, ...]:
    """All stages of `config`, inputs before what reads them. `source`: the digest of its images."""
    method, protocol = METHODS[config.method], PROTOCOLS[config.protocol]
    wanted = experts(config)
    own = method.stages(config)
    return (
        shard(source),
        *whiten(config),
        *(expert(role, config) for role in wanted),
        *own,
        relabel(config, method.distilled),
        *chosen(config),
        *protocol.stages(config, roles(config)),
    )


def experts(config: Any) -> tuple[str, ...]:
    """The networks that somebody reads: the method, a kind of label, a row of the verdict."""
    method, protocol = METHODS[config.method], PROTOCOLS[config.protocol]
    labels = KINDS[config.relabel.labels].teacher
    teacher = tuple(labellers(config)) if labels or protocol.teacher(config) else ()
    observer = ("observer",) if protocol.observer(config) else ()
    asked = {*method.experts(config), *teacher, *observer}
    if "teacher" in asked and is_observer(config):
        asked.add("observer")
    return tuple(role for role in ROLES if role in asked)


def chosen(config: Any) -> tuple[Stage, ...]:
    """The choice between the method's images and simpler ones, and labels of what was chosen."""
    made = choose.stages(config, roles(config))
    return (*made, relabel(config, choose.CHOOSE, CHOSEN_LABELS)) if made else ()


def roles(config: Any) -> Roles:
    """Which stages hold what the labels, the students and the report read."""
    method = METHODS[config.method]
    choice = {"chosen": choose.CHOOSE, "chosen_labels": CHOSEN_LABELS}
    trained = {role: (role, "weights.pt") for role in reversed(experts(config))}
    return Roles(
        distilled=method.distilled,
        initial=method.initial,
        learned=method.learned(config),
        **(choice if choose.wanted(config) else {}),
        judged={**trained, **method.judged},
    )


def commands() -> dict[str, str]:
    """Every job of every method and protocol, and what it does: name → help. These are commands
    too."""
    out: dict[str, str] = {}
    for name, method in METHODS.items():
        config = Config(
            method=name,
            data={"zca": method.whitened},
            choose={"how": "always"},
            teacher={"weights": OWN},
        )
        for stage in stages(config, ""):
            out.setdefault(stage.job, stage.help)
    for name in PROTOCOLS:
        for stage in stages(Config(protocol=name), ""):
            out.setdefault(stage.job, stage.help)
    return out
