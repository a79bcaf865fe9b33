"""Settings of soft labels, and of the views that they are made on."""

from __future__ import annotations

from typing import Literal

from ltdd_scale.settings import Areas, Number, Settings, Switch, Text, Whole, option


class Views(Settings):
    """The augmentation of a distilled set: drawn from a seed, so that it can be drawn again."""

    crop_scale: Areas = option([0.5, 1.0], "area range of the student's RandomResizedCrop")
    randaugment: Whole = option(0, "RandAugment operations an image", low=0)
    magnitude: Whole = option(9, "RandAugment magnitude of 30", low=0, high=30)
    cutmix: Switch = option(True, "CutMix between images of the set")


class Adjusted(Settings):
    """What every soft label depends on."""

    adjust: Switch = option(
        False, "ADSA: subtract τ·log π from the teacher's logits, τ found on the distilled images"
    )
    class_share: Number = option(
        0.0,
        "online, stored, single: λ, share of the image's class in a soft label, p = (1 − λ) · "
        "softmax of the teacher's logits + λ · class; 0: the logits as they are; the class alone "
        "is labels=hard",
        low=0,
        high=0.99,
    )
    batch_size: Whole = option(256, "images a teacher pass", low=1)


class Single(Adjusted):
    """What one soft label an image depends on."""

    views: Whole = option(
        1,
        "single: the label is the mean of the teacher's logits over as many views; 1: the whole "
        "image; more: and views drawn as a student draws them (section evaluate), without CutMix",
        low=1,
    )


class Stored(Adjusted):
    """What labels stored epoch by epoch depend on."""

    topk: Whole = option(0, "stored: logits kept an image and epoch; 0: all", low=0)
    epochs: Whole = option(
        0, "stored: epochs of labels, used in turn; 0: as many as the student has", low=0
    )


class Relabel(Single, Stored):
    """Soft labels."""

    labels: Text = option(
        "online",
        "online: teacher at student time; stored: top-k logits of every epoch's view; "
        "single: one soft label an image; hard: classes; "
        "learned: soft labels that the method has learned with the images",
    )
    labeller: Literal["teacher", "both"] = option(
        "teacher",
        "online, stored, single: whose logits label; both: the mean of the teacher's and the "
        "observer's, for twice the passes; they must be two networks, see teacher.weights",
    )
