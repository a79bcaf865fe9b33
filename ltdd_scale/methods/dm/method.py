"""Distribution matching (DM, Zhao and Bilen, WACV 2023) with Siamese augmentation.

Real images → images whose mean features, class by class, are those of the real set under random
networks. No trained network is needed.
"""

from __future__ import annotations

from typing import Any

from ltdd_scale.data.stage import real, seen
from ltdd_scale.methods.contract import Method
from ltdd_scale.methods.dm.settings import Dm
from ltdd_scale.stage import Division, Stage, places

HERE = "ltdd_scale.methods.dm"


def stages(config: Any) -> tuple[Stage, ...]:
    match = Stage(
        name="match",
        kind="match",
        version=1,
        run=f"{HERE}.match:run",
        reads={
            "dm": "dm",
            **places("seed", "ipc", "runtime.precision"),
            **seen(config),
        },
        inputs=real(config),
        division=Division.CHUNKS,
        pieces=f"{HERE}.chunks:pieces",
        cost=f"{HERE}.chunks:cost",
        check=f"{HERE}.chunks:check",
        help="match the features, gradients or ways of real and synthetic images",
    )
    return (match,)


DM = Method(
    name="dm",
    title="distribution matching",
    sections={"dm": Dm},
    stages=stages,
    distilled="match",
    whitened=True,
)
