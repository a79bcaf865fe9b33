"""Settings of the students."""

from __future__ import annotations

from typing import Literal

from ltdd_scale.labels.catalog import KINDS
from ltdd_scale.labels.settings import Views
from ltdd_scale.settings import Number, Switch, Text, Whole, option


class Training(Views):
    """How a student is trained."""

    batch_size: Whole = option(25, "images a step", low=1)
    optimizer: Literal["adamw", "sgd"] = option("adamw", "optimizer")
    lr: Number = option(1e-3, "learning rate", low=0)
    momentum: Number = option(0.9, "SGD momentum (Nesterov's)", low=0, high=1)
    weight_decay: Number = option(0.01, "weight decay", low=0)
    schedule: Literal["cosine", "cosine2", "steps"] = option(
        "cosine",
        "cosine to 0; cosine2: half of a cosine, to half the rate; "
        "steps: halved at 80, 90 and 95 % of the epochs",
    )
    kappa_ce: Number = option(0.025, "κ1, weight of the cross-entropy with the class", low=0)
    kappa_mse: Number = option(
        1.0, "κ2, weight of the squared error to the teacher's logits", low=0
    )
    ema: Number = option(
        0.99, "moving average of the student's weights; 0: none", low=0, high=0.99999
    )


class Evaluate(Training):
    """Students, trained from scratch on the distilled set and on the baselines."""

    nets: list[Text] = option(
        ["convnet3"],
        "networks that are trained on the set: convnet3, convnet4, resnet32, resnet18_cifar, "
        "resnet18_instance, vgg11_cifar, alexnet_cifar, or any torchvision classifier by name",
    )
    width: Whole = option(128, "channels of a student that is a ConvNet", low=1)
    norm: Literal["instance", "batch"] = option(
        "instance",
        "normalisation of a student that is a ConvNet or vgg11_cifar; other networks have their "
        "own: resnet18_cifar BatchNorm, resnet18_instance that of the field's tables",
    )
    epochs: Whole = option(1000, "student epochs", low=1)
    seeds: Whole = option(3, "repeats", low=1)
    random: Switch = option(True, "random real images of the same IPC beside the distilled set")
    full_epochs: Whole = option(
        0,
        "epochs of training on the whole long-tailed set with the same labels; 0: leave it out",
        low=0,
    )
    plain: Literal["auto", "own", "expert", "none"] = option(
        "auto",
        "the plain network on the whole set, with and without logit adjustment; own: trained "
        "here, once; expert: the teacher's plain head stands in; auto: own, where it costs at most "
        "a tenth of the run",
    )
    plain_epochs: Whole = option(60, "epochs of the plain network", low=1)
    matrix: Switch = option(
        False, "the label matrix: {random, initial, distilled} × evaluate.matrix_labels"
    )
    matrix_labels: list[Text] = option(
        [name for name, kind in KINDS.items() if not kind.of_set],
        "kinds of labels in the matrix; learned ones are added where the method has such",
    )
    split: Literal["test", "val"] = option(
        "test", "what students are judged on; choose settings on 'val' only"
    )
