"""Settings of the uni-level method (RLDD)."""

from __future__ import annotations

from collections.abc import Sequence
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
    lead: Whole = option(
        0,
        "for deep observers of large sets: this many images a class go layer after layer, and a "
        "few passes over the set correct them to 0.001 deviations; where they do not come as "
        "close, and with 0, all images go layer after layer",
        low=0,
    )
    batch_size: Whole = option(128, "images a forward pass", low=1)


class Initialize(Settings):
    """Which crops of real images the distilled ones start from."""

    select: Literal["herding", "confident", "k_center", "random"] = option(
        "herding",
        "herding: their mean feature stays close to the class's; confident: what the teacher is "
        "surest of, round after round over the images, as published; k_center: each the farthest "
        "in feature space from those taken; random: of random images, without the teacher",
    )
    pool: Number = option(
        0.5,
        "herding, k_center: choose among images to which the teacher gives their own class at "
        "least this probability, but never among less than the surer half of the class's; 0: all",
        low=0,
        high=1,
    )
    crops: Whole = option(
        5,
        "K, crops drawn of each real image; herding and k_center take 1 where images stay whole",
        low=1,
    )
    crop_scale: Areas = option(
        [1.0, 1.0],
        "area range of the crops; [1.0, 1.0]: whole images; empty: from the smallest area at "
        "which crops keep enough of the teacher's confidence, see keep",
    )
    keep: Number = option(
        0.9,
        "empty crop_scale: crops must keep this share of the teacher's probability of the own "
        "class, measured on crops of some images of each class",
        low=0,
        high=1,
    )
    mosaic: Whole = option(
        1, "crops along a side of an image: 2 makes each of 2 × 2 shrunk crops", low=1, high=2
    )
    batch_size: Whole = option(256, "crops a teacher pass", low=1)

    @property
    def needs_teacher(self) -> bool:
        return self.select != "random" or not self.crop_scale

    @property
    def by_features(self) -> bool:
        return self.select in ("herding", "k_center")

    def draws(self, crop_scale: Sequence[float]) -> int:
        """Crops of an image at a time, of areas `crop_scale`. Whole images have one feature each,
        and more would only repeat it."""
        return 1 if self.by_features and min(crop_scale, default=0.0) == 1.0 else self.crops


class Recover(Settings):
    """Statistical alignment of the images.

    Weights are settings because the published ones can hurt: see the configs.
    """

    iterations: Whole = option(600, "Adam steps a chunk; 0 keeps the initial images", low=0)
    batch_size: Whole = option(100, "images a chunk; a chunk is one batch", low=1)
    chunk_classes: Whole = option(
        0,
        "classes a chunk, at most, taken at a stride so that head and tail meet; 0: as many as fit "
        "with all their images, or ten where less than ten fit",
        low=0,
    )
    lr: Number = option(
        0.01, "Adam learning rate, in units of normalised pixels; cosine to 0", low=0
    )
    betas: list[Number] = option([0.5, 0.9], "Adam betas")
    ce: Number = option(0.0, "weight of the observer's cross-entropy", low=0)
    teacher_ce: Number = option(
        1.0,
        "weight of the teacher's cross-entropy: it keeps images what the teacher, who labels "
        "them, takes for their class",
        low=0,
    )
    guard: Literal["unsure", "sure", "all"] = option(
        "all",
        "which images the teacher's cross-entropy moves, by the probability p of its class that "
        "the teacher gives the initial image; unsure: weight (1 - p)², what it knows stays as "
        "it is; sure: weight p, what it is unsure of it does not guard; all: the same weight",
    )
    stop: Number = option(
        0.0,
        "stop a chunk when the share of its images that the teacher takes for their class falls "
        "by more than this below that of the initial ones, and keep the images of the check "
        "before; there are ten checks; 0: never",
        low=0,
        high=1,
    )
    settle: Number = option(
        0.9,
        "in the end each image goes back towards its initial one, in quarters of the way, until "
        "the teacher and the observer each give its class at least this share of the probability "
        "that they gave the initial one; 0: it stays",
        low=0,
        high=1,
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
    matching: Number = option(
        200.0,
        "weight of distribution matching: the squared distance of each class's mean features to "
        "those of real images, a mean over classes and features, under a random network that is "
        "new in each step (DM); 0: none",
        low=0,
    )
    matching_width: Whole = option(32, "channels of the random ConvNet-3", low=1)
    matching_real: Whole = option(
        16,
        "real images of each class of the chunk that a step looks at; small classes repeat",
        low=1,
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

    @property
    def needs_teacher(self) -> bool:
        return self.iterations > 0 and max(self.teacher_ce, self.stop, self.settle) > 0

    @property
    def weighs_images(self) -> bool:
        return self.teacher_ce > 0 and self.guard != "all"
