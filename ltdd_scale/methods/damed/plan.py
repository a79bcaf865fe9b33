"""What DAMED costs, and whether its settings can work."""

from __future__ import annotations

from typing import Any

from ltdd_scale.errors import UserError
from ltdd_scale.methods.matching import plans
from ltdd_scale.stage import Cost, Facts

HEAD = 0.6  # of a step with the head alone, in steps of the whole network: no graph by its weights


def cost(settings: Any, facts: Facts) -> Cost:
    own = settings.damed
    return plans.cost(
        settings, own, facts, own.inner_steps + HEAD * own.decoupling * own.classifier_steps
    )


def check(settings: Any) -> None:
    """Raise `UserError` where segments need snapshots that experts do not keep."""
    own = settings.damed
    plans.check("damed", own, settings.trajectory)
    if own.current_start > own.max_start:
        raise UserError(
            f"damed.current_start={own.current_start} grows to damed.max_start={own.max_start}: "
            "lower it"
        )
    if own.decoupling:
        trained = settings.classifier
        if not trained.lr:
            raise UserError("classifiers.lr=0: classifiers that do not move cannot be followed")
        there = trained.steps // trained.every
        if own.classifier_target > there:
            raise UserError(
                f"damed.classifier_target={own.classifier_target}, but a balanced classifier has "
                f"{there} snapshots: lower it, or raise classifiers.steps (now {trained.steps})"
            )
