"""What a method says of itself.

A method is a folder of `methods/` and a line of `catalog.py`. Whatever it is, it ends in one
artefact, the role ``distilled`` (`data/distilled.py`), which labels, students and the report read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ltdd_scale.settings import Settings
from ltdd_scale.stage import Stage


@dataclass(frozen=True)
class Method:
    """`sections` are the method's own sections of the config. `stages(config)` are its stages.

    `experts(config)` names the networks that its stages read ("observer", "teacher"). `distilled`
    is the stage whose folder holds the distilled set, `initial` the one with the images that it
    started from, if the method has such. `learned(config)`: whether the distilled set brings
    learned labels (`data/distilled.py`). `judged` are further networks to be judged beside the
    students: title → (stage, file). `check(config)` raises `UserError` for settings that cannot
    work together, and returns warnings about settings without effect. `whitened`: whether its
    stages can show whitened images to networks (`data.stage.seen` and `real`).
    """

    name: str
    title: str
    sections: Mapping[str, type[Settings]]
    stages: Callable[[Any], tuple[Stage, ...]]
    distilled: str
    initial: str = ""
    experts: Callable[[Any], tuple[str, ...]] = lambda config: ()
    learned: Callable[[Any], bool] = lambda config: False
    judged: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    check: Callable[[Any], list[str]] = lambda config: []
    whitened: bool = False
