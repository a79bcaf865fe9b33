"""The network that labels: the teacher, or the mean of teacher and observer.

Two networks that learned the same images, one with InstanceNorm, one with BatchNorm, err on
different ones; the mean of their logits is better than either (benchmarks/2026-11-27-experts.md).
"""

from __future__ import annotations

from ltdd_scale.models import frozen
from ltdd_scale.runtime.context import Context


def load(context: Context) -> frozen.Frozen | None:
    """The network that labels, out of the inputs of a stage (`stage.labellers`); None where it has
    none. Raises `UserError` where weights are missing or damaged."""
    if "teacher" not in context.inputs:
        return None
    names = [name for name in ("teacher", "observer") if name in context.inputs]
    return frozen.load_mean([context.input(name) / "weights.pt" for name in names], context.ranks)
