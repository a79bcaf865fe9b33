"""Settings of the students."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator

from ltdd_scale.labels.catalog import KINDS
from ltdd_scale.labels.settings import Views
from ltdd_scale.settings import Number, Settings, Switch, Text, Whole, option


class Steps(Views):
    """How a student is trained, whatever its labels: all that matters where they are classes."""

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
    ema: Number = option(
        0.99, "moving average of the student's weights; 0: none", low=0, high=0.99999
    )


class Training(Steps):
    """How a student is trained."""

    kappa_ce: Number = option(0.025, "κ1, weight of the cross-entropy with the class", low=0)
    kappa_mse: Number = option(
        1.0, "κ2, weight of the soft term (soft_loss), whichever it is", low=0
    )
    soft_loss: Literal["mse", "kl"] = option(
        "kl",
        "the soft term; kl: T² · KL(soft label ‖ student), both a softmax at temperature T; "
        "mse: squared error to the logits of the soft label, as published (EDC)",
    )
    temperature: Number = option(1.0, "kl: T", low=0.01, high=1000)
    order: Literal["both", "soft_hard_soft"] = option(
        "both",
        "what an epoch learns from, where there are soft labels; both: the class (κ1) and the soft "
        "label (κ2); soft_hard_soft: HALD's, the first quarter of the epochs soft labels alone "
        "(κ2), the middle half classes alone (weight 1), the last quarter soft labels again",
    )

    @property
    def kl_temperature(self) -> float | None:
        """T where the soft term is the KL, None where it is the squared error."""
        return self.temperature if self.soft_loss == "kl" else None


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
    random: Switch = option(
        True,
        "random real images of the same IPC beside the distilled set, with the same labels and "
        "with plain ones",
    )
    full_epochs: Whole = option(
        0,
        "epochs of training on the whole long-tailed set with the same labels; 0: leave it out",
        low=0,
    )
    plain: Literal["auto", "own", "expert", "none"] = option(
        "auto",
        "the plain network on the whole set, with and without logit adjustment; own: trained "
        "here, once; expert: the teacher's plain head stands in, where it was trained here; auto: "
        "own, where it costs at most a tenth of the run, else expert, or none where that is from "
        "elsewhere; protocol=two_stage trains it for each seed, with auto and expert too",
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
    embedding: Switch = option(
        True, "t-SNE of the judged images' features, for the page; some seconds"
    )


class Choose(Settings):
    """Which images are kept: the method's, those they started from, or random real ones."""

    how: Literal["auto", "always", "never"] = option(
        "auto",
        "short students tell on validation images, for each kind of label; auto: where the config "
        "has such (data.val_fraction, data.val_per_class, data.val_list, data.val_folder)",
    )
    share: Number = option(
        0.1,
        "epochs of a short student, as a share of evaluate.epochs",
        low=0,
        high=1,
    )
    steps: Whole = option(
        200,
        "steps of a short student at least: of few images it has more epochs than its share, up to "
        "half of evaluate.epochs",
        low=0,
    )
    seeds: Whole = option(3, "short students of each set and kind of label", low=1)


@dataclass(frozen=True)
class Criterion:
    """A rule that groups classes. `function` is named as ``package.module:function`` (see
    `judging/criteria.py`); it is given what a network says of the classes: their mean features,
    with `centres` k-means centres of each class, with `confusion` mean probabilities."""

    name: str
    function: str
    centres: bool = False
    confusion: bool = False


CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion("maxcut", "ltdd_scale.judging.criteria:maxcut", centres=True),
        Criterion("linkage", "ltdd_scale.judging.criteria:linkage"),
        Criterion("confusion", "ltdd_scale.judging.criteria:confusion", confusion=True),
        Criterion("given", "ltdd_scale.judging.criteria:given"),
        Criterion("random", "ltdd_scale.judging.criteria:random"),
    )
}


def _criterion(value: str) -> str:
    if value not in CRITERIA:
        raise ValueError(f"{value!r} is none of {', '.join(CRITERIA)}")
    return value


class Grouping(Settings):
    """How classes are grouped."""

    groups: Whole = option(
        2,
        "number of groups, at most half the classes; 0: by the best silhouette (up to 50), with "
        "restricted students only in the second stage",
        low=0,
    )
    smallest: Whole = option(2, "smallest number of classes in a group", low=1)
    criterion: Annotated[Text, AfterValidator(_criterion)] = option(
        "maxcut",
        "maxcut: the published rule, groups far apart by k-means centres of their classes; "
        "linkage: average linkage on the distances of class means; confusion: the same on the "
        "symmetrised soft confusion; given: two_stage.given; random: the control",
    )
    given: list[list[Text]] = option([], "given: the groups, each its classes by name or number")
    network: Literal["plain", "teacher", "observer", "distilled"] = option(
        "plain",
        "the network whose features group the classes: the plain one on the whole set, the "
        "teacher, the observer, the first student of the distilled set",
    )
    features_per_class: Whole = option(200, "training images a class that it looks at", low=1)
    centres: Whole = option(5, "maxcut: k-means centres a class", low=1)


Candidate = Literal[
    "trained_whole",
    "trained_distilled",
    "trained_random",
    "plain",
    "plain_adjusted",
    "teacher",
    "teacher_adjusted",
    "distilled",
    "random",
    "full",
    "full_adjusted",
]
ADJUSTED = "_adjusted"  # a network after logit adjustment, which costs nothing


class TwoStage(Grouping):
    """First the group of an image, then its class in the group."""

    first: list[Candidate] = option(
        ["trained_whole", "trained_distilled", "plain", "plain_adjusted", "teacher", "distilled"],
        "what tells the group: trained_…: a group classifier trained on the whole set, the "
        "distilled one, random real images; else the summed probabilities of a network of the "
        "run, which cost nothing; _adjusted: after logit adjustment (networks that the run does "
        "not have are left out)",
    )
    second: list[Candidate] = option(
        ["trained_distilled", "distilled", "random", "plain_adjusted"],
        "what tells the class in the group: trained_…: a student a group, of its images only; "
        "else a network of the run restricted to the group, which costs nothing",
    )
