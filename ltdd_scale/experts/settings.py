"""Settings of the networks that are trained on the real set."""

from __future__ import annotations

from typing import Literal

from ltdd_scale.settings import Areas, Number, Settings, Switch, Text, Whole, option


class Expert(Settings):
    """Training of the observer or the teacher (GLMC-style, RLDD §Debiased experts)."""

    net: Text = option(
        "convnet3",
        "convnet3, convnet4, resnet32, resnet18_cifar, resnet18_instance, vgg11_cifar, "
        "alexnet_cifar, or any torchvision classifier by name",
    )
    width: Whole = option(128, "channels of a ConvNet", low=1)
    norm: Literal["instance", "batch"] = option(
        "instance", "normalisation of a ConvNet or vgg11_cifar; other networks have their own"
    )
    epochs: Whole = option(200, "passes over the uniform stream", low=1)
    batch_size: Whole = option(64, "global batch: the same on any number of ranks", low=2)
    lr: Number = option(0.01, "peak learning rate of SGD", low=0)
    momentum: Number = option(0.9, "SGD momentum", low=0, high=1)
    weight_decay: Number = option(5e-3, "SGD weight decay", low=0)
    warmup_epochs: Whole = option(0, "linear warm-up before the cosine", low=0)
    reweight_power: Number = option(
        0.8, "q in the class weights w_k ∝ r_k^(−q) of the rebalanced head", low=0
    )
    contrast: Number = option(1.0, "γ1, weight of L_robust; 0 switches it off", low=0)
    debias: Number = option(1.0, "γ2, weight of L_debias", low=0)
    resample_power: Number = option(
        0.2, "per-image weight n_c^(−power) of the re-sampled stream", low=0
    )
    crop_scale: Areas = option([], "area range of RandomResizedCrop; empty: none")
    crop_padding: Whole = option(
        4, "border in pixels of the random shift, where crop_scale is empty", low=0
    )
    randaugment: Whole = option(0, "RandAugment operations an image", low=0)
    magnitude: Whole = option(9, "RandAugment magnitude of 30", low=0, high=30)


class Engine(Settings):
    """How experts are trained, whatever their network."""

    engine: Literal["ddp", "deepspeed"] = option(
        "ddp", "ddp: DistributedDataParallel; deepspeed: ZeRO"
    )
    debias: Switch = option(
        True, "debiased experts; false: plain cross-entropy on the uniform stream"
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
        "configs/deepspeed/zero1.json",
        "deepspeed: its options; batches, precision and clipping are set from here",
    )
