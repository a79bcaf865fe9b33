"""Settings of gradient matching (GM)."""

from __future__ import annotations

from typing import Literal

from ltdd_scale.settings import Number, Settings, Text, Whole, option


class Gm(Settings):
    """Gradient matching: the gradients of each class, under networks that train on the set."""

    networks: Whole = option(
        1000, "random networks, one after the other; 0 keeps the initial images", low=0
    )
    outer_steps: Whole = option(
        10,
        "steps of SGD on the images for each network; published: 1, 10, 20, 30, 40, 50 for IPC 1, "
        "10, 20, 30, 40, 50",
        low=1,
    )
    inner_epochs: Whole = option(
        50,
        "epochs that a network trains on the synthetic images between two outer steps; published: "
        "1, 50, 25, 20, 15, 10 for the same IPC",
        low=0,
    )
    lr: Number = option(0.1, "learning rate of the images, in units of normalised pixels", low=0)
    momentum: Number = option(0.5, "SGD momentum of the images", low=0, high=1)
    real_batch: Whole = option(256, "real images of a class that a step looks at, at most", low=1)
    inner_lr: Number = option(0.01, "learning rate of the network, SGD without momentum", low=0)
    inner_batch: Whole = option(256, "synthetic images of a step of the network, at most", low=1)
    net: Text = option(
        "convnet3", "the network: one without BatchNorm, since it sees one class at a time"
    )
    width: Whole = option(128, "channels of a ConvNet", low=1)
    norm: Literal["instance"] = option("instance", "normalisation of a ConvNet")
    dsa: Text = option(
        "color_crop_cutout_flip_scale_rotate",
        "Siamese augmentation: each class draws one of these in an outer step, each image in a "
        "step of the network; empty: none (DC). Without data.mirror there is no flip",
    )
