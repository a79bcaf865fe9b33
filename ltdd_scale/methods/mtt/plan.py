"""What MTT costs, and whether its settings can work."""

from __future__ import annotations

from typing import Any

from ltdd_scale.methods.matching import plans
from ltdd_scale.stage import Cost, Facts


def cost(settings: Any, facts: Facts) -> Cost:
    return plans.cost(settings, settings.mtt, facts, settings.mtt.inner_steps)


def check(settings: Any) -> None:
    """Raise `UserError` where segments need snapshots that experts do not keep."""
    plans.check("mtt", settings.mtt, settings.trajectory)
