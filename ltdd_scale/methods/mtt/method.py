"""Trajectory matching (MTT, Cazenavette et al., CVPR 2022), with its exact gradient.

Experts trained on the real set → images on which a student goes their way.
"""

from __future__ import annotations

from typing import Any

from ltdd_scale.data.stage import real, seen
from ltdd_scale.experts.trajectories import stage as trajectories
from ltdd_scale.experts.trajectories.settings import Trajectory
from ltdd_scale.methods.contract import Method
from ltdd_scale.methods.mtt.settings import Mtt
from ltdd_scale.stage import Division, Section, Stage, places

HERE = "ltdd_scale.methods.mtt"


def stages(config: Any) -> tuple[Stage, ...]:
    experts = trajectories.experts(config)
    match = Stage(
        name="match",
        kind="match-mtt",
        version=1,
        run=f"{HERE}.match:run",
        reads={
            "mtt": "mtt",
            "trajectory": Section("trajectories", Trajectory),
            **places("seed", "ipc"),
            **seen(config),
        },
        inputs={**real(config), **{e.name: e.name for e in experts}},
        division=Division.RANKS,
        cost=f"{HERE}.plan:cost",
        check=f"{HERE}.plan:check",
        help="match the features, gradients or ways of real and synthetic images",
        smaller="mtt.batch_size, mtt.inner_steps or ipc",
    )
    return (*experts, match)


MTT = Method(
    name="mtt",
    title="matching training trajectories",
    sections={"mtt": Mtt},
    stages=stages,
    distilled="match",
    whitened=True,
)
