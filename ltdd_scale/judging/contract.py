"""What a protocol says of itself: a way to judge a distilled set."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ltdd_scale.settings import Settings
from ltdd_scale.stage import Stage


@dataclass(frozen=True)
class Roles:
    """Which stage's folder holds what, whatever the method: judging knows no method.

    `chosen` and `chosen_labels` are of the images that leave the house: empty where none are
    chosen, and the distilled ones leave. `learned`: whether the distilled set brings labels of its
    own. `judged`: title → (stage, file) of networks that are judged beside the students.
    """

    distilled: str
    initial: str = ""
    labels: str = "relabel"
    chosen: str = ""
    chosen_labels: str = ""
    learned: bool = False
    judged: Mapping[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Protocol:
    """`stages(config, roles)` trains and judges; the last one holds ``results.json``.

    `teacher(config)`, `observer(config)`: whether one of them reads this expert. `sections` are its
    own sections of the config, beside `evaluate`. `check(config)` raises `UserError` for settings
    that cannot work together, and returns warnings about settings without effect; it is told which
    experts the method reads, too. `plain`: whether it trains the plain network whatever that costs.
    """

    name: str
    stages: Callable[[Any, Roles], tuple[Stage, ...]]
    teacher: Callable[[Any], bool]
    observer: Callable[[Any], bool] = lambda config: False
    sections: Mapping[str, type[Settings]] = field(default_factory=dict)
    check: Callable[[Any, Collection[str]], list[str]] = lambda config, experts: []
    plain: bool = False
