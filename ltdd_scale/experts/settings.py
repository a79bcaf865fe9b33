"""Settings of the networks that are trained on the real set."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ltdd_scale.settings import Areas, Number, Settings, Switch, Text, Whole, option


class Expert(Settings):
    """Training of the observer or the teacher."""

    recipe: Literal["balanced", "glmc"] = option(
        "balanced",
        "balanced: one head and one view, balanced softmax, CutMix in some of the images; "
        "glmc: two heads, two views of two streams, as published (RLDD §Debiased experts)",
    )

    net: Text = option(
        "convnet3",
        "convnet3, convnet4, resnet32, resnet18_cifar, resnet18_instance, vgg11_cifar, "
        "alexnet_cifar, or any torchvision classifier by name",
    )
    width: Whole = option(128, "channels of a ConvNet", low=1)
    norm: Literal["instance", "batch"] = option(
        "batch", "normalisation of a ConvNet or vgg11_cifar; other networks have their own"
    )
    epochs: Whole = option(200, "passes over the uniform stream", low=1)
    batch_size: Whole = option(32, "global batch: the same on any number of ranks", low=2)
    optimizer: Literal["sgd", "adamw"] = option("adamw", "optimizer")
    lr: Number = option(1e-3, "peak learning rate", low=0)
    momentum: Number = option(0.9, "SGD momentum", low=0, high=1)
    weight_decay: Number = option(0.01, "weight decay", low=0)
    warmup_epochs: Whole = option(0, "linear warm-up before the cosine", low=0)
    reweight_power: Number = option(
        0.8, "glmc: q in the class weights w_k ∝ r_k^(−q) of the rebalanced head; 0: none", low=0
    )
    contrast: Number = option(1.0, "glmc: γ1, weight of L_robust; 0 switches it off", low=0)
    debias: Number = option(1.0, "glmc: γ2, weight of L_debias", low=0)
    resample_power: Number = option(
        0.2, "glmc: per-image weight n_c^(−power) of the re-sampled stream; 0: uniform", low=0
    )
    prior: Number = option(
        1.0,
        "balanced: τ of the log prior that training adds to the logits; 0: plain cross-entropy",
        low=0,
    )
    sample_power: Number = option(
        0.0, "balanced: per-image weight n_c^(−power) of the images; 1: class-balanced", low=0
    )
    cutmix: Number = option(
        0.5, "balanced: share of the images into which CutMix pastes others", low=0, high=1
    )
    paste_power: Number = option(
        0.0,
        "balanced: per-image weight n_c^(−power) of what CutMix pastes; 1: class-balanced",
        low=0,
    )
    crop_scale: Areas = option([], "area range of RandomResizedCrop; empty: none")
    crop_padding: Whole = option(
        4,
        "border in pixels of the random shift, where crop_scale is empty; where nothing is said, "
        "an eighth of data.resolution: 4 at 32 px",
        low=0,
    )
    randaugment: Whole = option(0, "RandAugment operations an image", low=0)
    magnitude: Whole = option(9, "RandAugment magnitude of 30", low=0, high=30)
    begin_resolution: Whole = option(
        0,
        "side in pixels of the images of the first half of the epochs; they then grow, and are "
        "whole for the last fifth: from half of data.resolution that is half of the arithmetic; 0: "
        "always whole",
        low=0,
    )


TORCHVISION = "torchvision:"  # begins the name of weights that torchvision gives
OBSERVER = "observer"  # the teacher's weights are the observer's
OWN = "own"  # the teacher is trained, though it is to be like the observer


class Brought(Settings):
    """An expert that is not trained here."""

    weights: Text = option(
        "",
        "weights from elsewhere, for the net that is named: a file (a state dict of torch.save, or "
        "safetensors), or torchvision:NAME, such as torchvision:IMAGENET1K_V2; training is "
        "skipped; empty: the expert is trained",
    )
    head_epochs: Whole = option(
        0,
        "with weights: train a last layer of its own for these classes, by the balanced softmax, "
        "and nothing else, for so many epochs; 0: the file's, which must know these classes",
        low=0,
    )


class Role(Brought, Expert):
    """What the config says of an expert."""


class Teacher(Role):
    """The teacher. What a config does not say of it is as the observer's, not as it is here."""

    weights: Text = option(
        "",
        "weights from elsewhere, as observer.weights; observer: the teacher is the observer, one "
        "training gives both; own: the teacher is trained; empty: it is the observer where its "
        "training would be the same, else it is trained",
    )


def options_of(deepspeed: str) -> Path:
    """The file of DeepSpeed's options: one of those that come with this package, by its name."""
    own = Path(__file__).parent / "deepspeed" / f"{deepspeed}.json"
    return own if own.exists() else Path(deepspeed)


def usual_padding(resolution: int) -> int:
    """The experts' `crop_padding` where nothing is said: the 4 pixels of the field at 32."""
    return resolution // 8


# Settings that one recipe reads and the other does not.
OF_RECIPE = {
    "glmc": ("reweight_power", "contrast", "debias", "resample_power"),
    "balanced": ("prior", "sample_power", "cutmix", "paste_power"),
}


def idle(expert: Role) -> dict[str, str]:
    """Settings that the training of `expert` does not read: name → beside which setting."""
    other = "balanced" if expert.recipe == "glmc" else "glmc"
    out = dict.fromkeys(OF_RECIPE[other], f"recipe={expert.recipe}")
    if not expert.net.startswith("convnet"):
        own = ("width",) if expert.net == "vgg11_cifar" else ("width", "norm")
        out |= dict.fromkeys(own, f"net={expert.net}")
    if expert.crop_scale:
        out["crop_padding"] = "crop_scale"
    if expert.optimizer == "adamw":
        out["momentum"] = "optimizer=adamw"
    if not expert.randaugment:
        out["magnitude"] = "randaugment=0"
    if expert.recipe == "balanced" and not expert.cutmix:
        out["paste_power"] = "cutmix=0"
    return out


def is_observer(config: Any) -> bool:
    """Whether the teacher of `config` is the observer: one training gives both."""
    teacher, observer = config.teacher, config.observer
    read = set(Expert.model_fields) - set(idle(teacher))
    alike = all(getattr(teacher, n) == getattr(observer, n) for n in read)
    return teacher.weights == OBSERVER or (not teacher.weights and alike)


def trains_teacher(config: Any) -> bool:
    """Whether the teacher of `config` has a training of its own."""
    return config.teacher.weights in ("", OWN) and not is_observer(config)


def is_brought(config: Any) -> bool:
    """Whether the expert that labels is from elsewhere: how it was trained is not known."""
    expert = config.observer if is_observer(config) else config.teacher
    return expert.weights not in ("", OWN)


class Architecture(Settings):
    """The network of an expert: what weights from elsewhere must fit."""

    net: Text
    width: Whole
    norm: Text


class Head(Settings):
    """Training of the last layer alone, by AdamW."""

    head_epochs: Whole
    batch_size: Whole
    optimizer: Text
    lr: Number
    weight_decay: Number
    prior: Number

    @property
    def rate_and_decay(self) -> tuple[float, float]:
        """AdamW's learning rate and weight decay: the defaults where those that are said are
        SGD's, which are a hundred times as large."""
        said = self if self.optimizer == "adamw" else Expert()
        return said.lr, said.weight_decay


class Priors(Settings):
    """What the logits of the recipe "balanced" have of the classes' frequencies."""

    prior: Number
    sample_power: Number
    paste_power: Number
    cutmix: Number


class Weights(Settings):
    """Weights from elsewhere: where they lie, which is not hashed, and what they are."""

    place: Text = Field(exclude=True)
    digest: Text


# What weights from elsewhere leave to say.
SAID = {*Brought.model_fields, *Architecture.model_fields, *Head.model_fields}


class Engine(Settings):
    """How experts are trained, whatever their network."""

    engine: Literal["ddp", "deepspeed"] = option(
        "ddp", "ddp: DistributedDataParallel; deepspeed: ZeRO"
    )
    micro_batch: Whole = option(
        0,
        "images of each view that a rank puts through the network at once; more are "
        "accumulated; 0: its whole part of the batch",
        low=0,
    )
    clip: Number = option(0.0, "largest norm of the gradient; 0: no clipping", low=0)
    sync_bn: Switch = option(
        True,
        "BatchNorm over the batches of all ranks, so that training does not depend on their number",
    )
    compile: Switch = option(
        False,
        "torch.compile: faster on GPUs after a minute or more at each start; changes the last bits",
    )


class Train(Engine):
    """The engine that trains both experts."""

    deepspeed: Text = option(
        "zero1",
        "deepspeed: zero1 or zero2, or a JSON file of its options; batches, precision and clipping "
        "are set from here",
    )
