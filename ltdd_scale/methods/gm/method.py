"""Gradient matching (DC, ICLR 2021) with Siamese augmentation (DSA, ICML 2021).

Real images → images that give a network the gradients, class by class, that the real set gives it,
while the network trains on them. No trained network is needed.
"""

from __future__ import annotations

from typing import Any

from ltdd_scale.data.stage import real, seen
from ltdd_scale.methods.contract import Method
from ltdd_scale.methods.gm.settings import Gm
from ltdd_scale.stage import Division, Stage, places

HERE = "ltdd_scale.methods.gm"


def stages(config: Any) -> tuple[Stage, ...]:
    match = Stage(
        name="match",
        kind="match-gm",
        version=2,  # 2: it does not depend on runtime.precision, which it never read
        run=f"{HERE}.match:run",
        reads={
            "gm": "gm",
            **places("seed", "ipc"),
            **seen(config),
        },
        inputs=real(config),
        division=Division.RANKS,
        cost=f"{HERE}.cost:cost",
        check=f"{HERE}.cost:check",
        help="match the features, gradients or ways of real and synthetic images",
        smaller="ipc, gm.real_batch or gm.inner_batch",
    )
    return (match,)


def check(config: Any) -> list[str]:
    """Warnings about settings without effect."""
    gm, trains = config.gm, {"inner_lr", "inner_batch"}
    if gm.outer_steps == 1:
        idle, why = trains | {"inner_epochs"}, "gm.outer_steps=1"
    elif gm.inner_epochs == 0:
        idle, why = trains, "gm.inner_epochs=0"
    else:
        return []
    changed = [n for n in sorted(idle) if getattr(gm, n) != Gm.model_fields[n].default]
    return [f"gm.{name} has no effect with {why}: no network is trained" for name in changed]


GM = Method(
    name="gm",
    title="gradient matching",
    sections={"gm": Gm},
    stages=stages,
    distilled="match",
    check=check,
    whitened=True,
)
