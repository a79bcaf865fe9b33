"""The records of the stages "trajectory/000" …, one an expert, and "classifier/000" …

Experts do not know of each other: each is a unit of work. Its folder does not depend on how many
there are, nor on who reads it.
"""

from __future__ import annotations

from typing import Any

from ltdd_scale.data.stage import real, seen
from ltdd_scale.experts.trajectories.settings import Classifier, Network, Trajectory
from ltdd_scale.stage import Division, Section, Stage, places

HERE = "ltdd_scale.experts.trajectories"
TRAJECTORIES, CLASSIFIERS = "trajectories", "classifiers"  # sections of the config, and groups


def experts(config: Any) -> tuple[Stage, ...]:
    """One stage an expert, each a unit."""
    return tuple(_expert(k, config) for k in range(config.trajectories.experts))


def classifiers(config: Any) -> tuple[Stage, ...]:
    """One stage an expert: its classifier, trained once more. Reads what `experts` makes."""
    return tuple(_classifier(k, config) for k in range(config.trajectories.experts))


def _expert(k: int, config: Any) -> Stage:
    return Stage(
        name=f"trajectory/{k:03d}",
        kind="trajectory",
        version=1,
        run=f"{HERE}.train:run",
        reads={
            "trajectory": Section(TRAJECTORIES, Trajectory),
            **seen(config),
            **places("seed"),
        },
        given={"expert": k},
        inputs=real(config),
        division=Division.UNITS,
        group=TRAJECTORIES,
        cost=f"{HERE}.cost:trajectory",
        check=f"{HERE}.train:check",
        help="train experts on the real set and keep their weights on the way",
        smaller="trajectories.width, trajectories.batch_size or trajectories.keep",
    )


def _classifier(k: int, config: Any) -> Stage:
    return Stage(
        name=f"classifier/{k:03d}",
        kind="classifier",
        version=1,
        run=f"{HERE}.classifier:run",
        reads={
            "classifier": Section(CLASSIFIERS, Classifier),
            "network": Section(TRAJECTORIES, Network),
            **seen(config),
            **places("seed"),
        },
        given={"expert": k},
        inputs={**real(config), "trajectory": f"trajectory/{k:03d}"},
        division=Division.UNITS,
        group=CLASSIFIERS,
        cost=f"{HERE}.cost:classifier",
        check=f"{HERE}.classifier:check",
        help="train the classifiers of finished experts once more, on balanced batches",
        smaller="classifiers.batch_size or trajectories.width",
    )
