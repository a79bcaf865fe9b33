"""How long a student is trained."""

from __future__ import annotations

from typing import Any


def epochs_of(settings: Any, images: int) -> int:
    """Epochs of a student that is trained on `images` images. `settings` is what its stage reads:
    a short student of few images has more `epochs`, up to `most`, until it has `least_steps`."""
    if "least_steps" not in settings:
        return settings.epochs
    steps = -(-images // settings.training.batch_size)  # an epoch
    wanted = -(-settings.least_steps // steps)
    return max(settings.epochs, min(settings.most, wanted))
