"""Settings of expert trajectories, and of classifiers that are trained once more."""

from __future__ import annotations

from typing import Any, Literal

from ltdd_scale.settings import Number, Settings, Text, Whole, option


class Network(Settings):
    """The network of an expert, and how it is shown the real images."""

    net: Text = option(
        "convnet3", "a network without BatchNorm, such as convnet3 or convnet4; dropout is off"
    )
    width: Whole = option(128, "channels of a ConvNet", low=1)
    norm: Literal["instance"] = option("instance", "normalisation of the network")
    dsa: Text = option(
        "color_crop_cutout_flip_scale_rotate",
        "Siamese augmentation: each step draws one of these, with parameters of its own for each "
        "image; empty: none. Without data.mirror there is no flip",
    )


class Descent(Settings):
    """Steps at a constant rate, and how often weights are kept."""

    steps: Whole = option(1000, "steps of training", low=1)
    every: Whole = option(20, "steps from one snapshot of the weights to the next", low=1)
    batch_size: Whole = option(256, "real images a step", low=1)
    optimizer: Literal["sgd", "gsam"] = option(
        "sgd", "gsam: sharpness-aware steps (GSAM, ICLR 2022); they cost twice as much"
    )
    lr: Number = option(0.01, "learning rate, constant", low=0)
    momentum: Number = option(0.0, "SGD momentum", low=0, high=1)
    weight_decay: Number = option(0.0, "weight decay", low=0)
    rho: Number = option(0.01, "gsam: length ρ of the ascent before the gradient is taken", low=0)
    alpha: Number = option(
        0.3, "gsam: α, weight of the part of the plain gradient that is taken off", low=0
    )


class Trajectory(Descent, Network):
    """What one expert depends on."""

    keep: Whole = option(
        0,
        "snapshots kept after the initial weights, the first ones; 0: all. The last weights are "
        "kept beside them in any case",
        low=0,
    )
    stored: Literal["float32", "bfloat16"] = option(
        "float32",
        "bfloat16: half of the disk, but the difference of snapshots 40 steps apart, which is what "
        "is matched, was off by 4 % at the start and by 26 % after 600 steps (ConvNet-3, 32 wide)",
    )


class Trajectories(Trajectory):
    """Experts on the real set, and the snapshots of their weights that are kept."""

    experts: Whole = option(10, "experts, each a training of its own", low=1)


class Classifier(Descent):
    """Classifiers of finished experts, trained once more on batches of balanced classes (DAMED)."""

    steps: Whole = option(400, "steps of training", low=1)
    images_per_class: Whole = option(
        4, "images that a class gives when it is its turn; classes take turns", low=1
    )
    max_norm: Number = option(
        0.0, "MaxNorm: largest norm of a class's row of weights, after each step; 0: none", low=0
    )


def without_effect(config: Any) -> list[str]:
    """What a config sets in these sections without effect."""
    out = []
    for name in ("trajectories", "classifiers"):
        section = getattr(config, name)
        if section.optimizer != "gsam":
            default = type(section)()
            out += [
                f"{name}.{key} has no effect with {name}.optimizer={section.optimizer}"
                for key in ("rho", "alpha")
                if getattr(section, key) != getattr(default, key)
            ]
    return out
