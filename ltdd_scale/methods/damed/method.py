"""DAMED (Zhao et al., *Distilling Long-tailed Datasets*, CVPR 2025), called LAD at first.

Experts trained on the real set, and their classifiers once more on balanced batches → images with
learned labels on which a student goes the way of both.
"""

from __future__ import annotations

from typing import Any

from ltdd_scale.data.stage import real, seen
from ltdd_scale.experts.trajectories import stage as trajectories
from ltdd_scale.experts.trajectories.settings import Classifier, Trajectory
from ltdd_scale.methods.contract import Method
from ltdd_scale.methods.damed.settings import Damed
from ltdd_scale.stage import Division, Section, Stage, places

HERE = "ltdd_scale.methods.damed"


def stages(config: Any) -> tuple[Stage, ...]:
    decoupled = config.damed.decoupling
    experts = trajectories.experts(config)
    classifiers = trajectories.classifiers(config) if decoupled else ()
    match = Stage(
        name="match",
        kind="match-damed",
        version=1,
        run=f"{HERE}.match:run",
        reads={
            "damed": "damed",
            "trajectory": Section("trajectories", Trajectory),
            **({"classifier": Section("classifiers", Classifier)} if decoupled else {}),
            **places("seed", "ipc"),
            **seen(config),
        },
        inputs={**real(config), **{e.name: e.name for e in (*experts, *classifiers)}},
        division=Division.RANKS,
        cost=f"{HERE}.plan:cost",
        check=f"{HERE}.plan:check",
        help="match the features, gradients or ways of real and synthetic images",
        smaller="damed.batch_size, damed.inner_steps or ipc",
    )
    return (*experts, *classifiers, match)


def check(config: Any) -> list[str]:
    """Warnings about settings without effect."""
    own, without = config.damed, []
    if not own.decoupling:
        names = ("backbone_weight", "classifier_weight", "classifier_steps", "classifier_target")
        without += [(name, "decoupling=false") for name in names]
    if not own.learn_labels:
        without.append(("lr_labels", "learn_labels=false"))
    default = Damed()
    return [
        f"damed.{name} has no effect with damed.{why}"
        for name, why in without
        if getattr(own, name) != getattr(default, name)
    ]


DAMED = Method(
    name="damed",
    title="distribution-agnostic matching with decoupled experts (LAD)",
    sections={"damed": Damed},
    stages=stages,
    distilled="match",
    check=check,
    learned=lambda config: config.damed.learn_labels,
    whitened=True,
)
