"""Settings that all methods share which match expert trajectories."""

from __future__ import annotations

from typing import Literal

from ltdd_scale.settings import Number, Settings, Text, Whole, option


class Unrolled(Settings):
    """How a student is unrolled beside an expert, and how the images learn from it.

    Starts and targets are counted in snapshots of the experts: one every `trajectories.every`
    steps.
    """

    iterations: Whole = option(
        2000, "steps of SGD on the images; 0 keeps the initial images", low=0
    )
    segments: Whole = option(
        1, "segments an iteration: their mean gradient is followed, ranks share them out", low=1
    )
    inner_steps: Whole = option(20, "N, steps of the student in a segment", low=1)
    target: Whole = option(2, "M, snapshots from a segment's start to its target", low=1)
    min_start: Whole = option(0, "first snapshot that a segment starts from", low=0)
    max_start: Whole = option(20, "last snapshot that a segment starts from", low=0)
    batch_size: Whole = option(
        100, "synthetic images a step of the student; at most those there are", low=1
    )
    lr_images: Number = option(
        100.0, "learning rate of the images, in units of normalised pixels", low=0
    )
    momentum: Number = option(0.5, "SGD momentum of the images and of log β", low=0, high=1)
    rate: Number = option(0.01, "β to begin with: the student's learning rate, learned", low=1e-12)
    lr_rate: Number = option(0.01, "learning rate of log β; 0: β stays", low=0)
    gradient: Literal["exact", "truncated"] = option(
        "exact", "truncated: TESLA's, as released, without the second derivatives by the weights"
    )
    dsa: Text = option(
        "color_crop_cutout_flip_scale_rotate",
        "Siamese augmentation of the student's batches: each step draws one of these, its "
        "parameters for each image; empty: none. Without data.mirror there is no flip",
    )
