"""Settings of trajectory matching (MTT)."""

from __future__ import annotations

from ltdd_scale.methods.matching.settings import Unrolled


class Mtt(Unrolled):
    """Trajectory matching: a student that is trained on the images goes where experts went."""
