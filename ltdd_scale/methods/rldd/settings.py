"""Settings of the uni-level method (RLDD)."""

from __future__ import annotations

from typing import Literal

from ltdd_scale.settings import Areas, Number, Settings, Switch, Text, Whole, option


class Net(Settings):
    """A network of an expert: all that its cost depends on."""

    net: Text
    width: Whole
    norm: Text


class Calibrate(Settings):
    """Fair BatchNorm statistics."""

    fair: Switch = option(
        True,
        "false: the observer's own running statistics, no class-wise term in the alignment",
    )
    variance: Literal["mixture", "within"] = option(
        "mixture", "mixture: of the class-balanced population; within: mean of the class variances"
    )
    conv_inputs: Switch = option(False, "collect (and align) the inputs of convolutions too")
    recalibrate: Switch = option(
        True,
        "give the observer the fair statistics, layer after layer (a pass over the set for "
        "each, up to it); false: one pass, it keeps its own",
    )
    batch_size: Whole = option(128, "images a forward pass", low=1)


class Initialize(Settings):
    """Confidence-guided multi-round initialisation."""

    confident: Switch = option(True, "confident crops; false: random crops of random images")
    crops: Whole = option(5, "K, crops drawn of each real image", low=1)
    crop_scale: Areas = option([0.5, 1.0], "area range of the crops")
    batch_size: Whole = option(256, "crops a teacher pass", low=1)


class Recover(Settings):
    """Statistical alignment of the images.

    Weights are settings because the published ones can hurt: see the configs.
    """

    iterations: Whole = option(200, "Adam steps a chunk; 0 keeps the initial images", low=0)
    batch_size: Whole = option(100, "images a chunk; a chunk is one batch", low=1)
    chunk_classes: Whole = option(
        0, "classes a chunk, taken at a stride so that head and tail meet; 0: as many as fit", low=0
    )
    lr: Number = option(
        0.005, "Adam learning rate, in units of normalised pixels; cosine to 0", low=0
    )
    betas: list[Number] = option([0.5, 0.9], "Adam betas")
    ce: Number = option(0.0, "weight of the observer's cross-entropy", low=0)
    teacher_ce: Number = option(
        1.0,
        "weight of the teacher's cross-entropy: it keeps images what the teacher, who labels "
        "them, takes for their class",
        low=0,
    )
    alignment: Number = option(1.0, "r, weight of the alignment term", low=0)
    classwise: Number = option(
        0.5,
        "share of the class-wise statistics in the alignment; the rest is global",
        low=0,
        high=1,
    )
    first_layer: Number = option(10.0, "weight of the first layer in the alignment", low=0)
    ema: Number = option(
        0.8, "straight-through moving average of the batch statistics; 0: none", low=0, high=0.9999
    )
    crop_scale: Areas = option([0.5, 1.0], "area range of the crop in each step")
    resolutions: list[Whole] = option(
        [],
        "FADRM: sides of the images in stages of equal length, such as [200, 224, 200, 224]; "
        "empty: one stage at data.resolution",
    )
    residual: Number = option(
        0.0, "FADRM: share of the initial image that is mixed in between stages", low=0, high=1
    )
