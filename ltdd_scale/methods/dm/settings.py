"""Settings of distribution matching (DM)."""

from __future__ import annotations

from typing import Literal

from ltdd_scale.settings import Number, Settings, Text, Whole, option


class Dm(Settings):
    """Distribution matching: the mean features of each class under random networks."""

    iterations: Whole = option(
        1000, "steps of SGD, each with a fresh random network; 0 keeps the initial images", low=0
    )
    lr: Number = option(1.0, "learning rate, in units of normalised pixels", low=0)
    momentum: Number = option(0.5, "SGD momentum", low=0, high=1)
    real_batch: Whole = option(256, "real images of a class that a step looks at, at most", low=1)
    net: Text = option(
        "convnet3", "the random network: one without BatchNorm, since it sees one class at a time"
    )
    width: Whole = option(128, "channels of a ConvNet", low=1)
    norm: Literal["instance"] = option("instance", "normalisation of a ConvNet")
    dsa: Text = option(
        "color_crop_cutout_flip_scale_rotate",
        "Siamese augmentation: each step draws one of these; empty: none. Without data.mirror "
        "there is no flip",
    )
