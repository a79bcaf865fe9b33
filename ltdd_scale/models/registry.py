"""Networks by name: ConvNets, the field's networks for small images, any torchvision classifier."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache, partial
from textwrap import shorten
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from ltdd_scale.errors import UserError
from ltdd_scale.runtime.ranks import torch_seed

CONVNETS = {"convnet3": 3, "convnet4": 4}  # name → depth
RESNETS = {"resnet18_cifar": "batch", "resnet18_instance": "instance"}  # name → normalisation
NAMES = (*CONVNETS, "resnet32", *RESNETS, "vgg11_cifar", "alexnet_cifar")  # not torchvision's
# Those that take images of the side that they were built for, or cannot do with less.
ONE_SIDE = (*CONVNETS, "resnet18_instance", "vgg11_cifar", "alexnet_cifar")

M = TypeVar("M", bound=nn.Module)


def _norm(kind: str, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(channels, channels)


class ConvNet(nn.Sequential):
    """The field's ConvNet (DC, ICLR 2021): `depth` blocks of 3×3 convolution, normalisation, ReLU
    and 2×2 average pooling.

    Instance normalisation is GroupNorm with one channel a group, as in the reference
    implementation (affine, no running statistics).
    """

    def __init__(self, depth: int, width: int, norm: str, resolution: int):
        layers: list[nn.Module] = []
        for k in range(depth):
            layers += [
                nn.Conv2d(width if k else 3, width, 3, padding=1),
                _norm(norm, width),
                nn.ReLU(inplace=True),
                nn.AvgPool2d(2),
            ]
        super().__init__(*layers, nn.Flatten())
        self.num_features = width * (resolution // 2**depth) ** 2
        _need(f"convnet{depth}", 2**depth, resolution)


class Vgg11(nn.Sequential):
    """VGG-11 for small images, as DC's (ICLR 2021): normalisation after each convolution, five
    2×2 poolings, one linear layer on the 512 features. Larger images are averaged in the end.

    The last convolutions see a 1/16 of the side, 2×2 pixels of 32: instance normalisation has more
    than one pixel everywhere.
    """

    num_features = 512

    def __init__(self, norm: str, resolution: int):
        _need("vgg11_cifar", 32, resolution)
        layers: list[nn.Module] = []
        channels = 3
        for stage in ((64,), (128,), (256, 256), (512, 512), (512, 512)):
            for width in stage:
                convolution = nn.Conv2d(channels, width, 3, padding=1)
                layers += [convolution, _norm(norm, width), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2))
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class AlexNet(nn.Sequential):
    """AlexNet for small images, as DC's (ICLR 2021): three 2×2 poolings, no normalisation, one
    linear layer on the 192 maps of an eighth of the side."""

    def __init__(self, resolution: int):
        _need("alexnet_cifar", 8, resolution)
        layers: list[nn.Module] = []
        channels = 3
        for width, kernel, pooled in (
            (128, 5, True),
            (192, 5, True),
            (256, 3, False),
            (192, 3, False),
            (192, 3, True),
        ):
            convolution = nn.Conv2d(channels, width, kernel, padding=kernel // 2)
            layers += [convolution, nn.ReLU(inplace=True)]
            layers += [nn.MaxPool2d(2)] if pooled else []
            channels = width
        super().__init__(*layers, nn.Flatten())
        self.num_features = channels * (resolution // 8) ** 2


def _need(net: str, side: int, resolution: int) -> None:
    """Raise `UserError` where images are smaller than `side` pixels."""
    if resolution < side:
        raise UserError(f"{net} needs images of at least {side} pixels, not {resolution}")


class _Block(nn.Module):
    """Basic block of the CIFAR ResNets (He et al. 2016), with the parameter-free shortcut A."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride > 1 or self.more:
            x = F.pad(
                x[:, :, :: self.stride, :: self.stride],
                (0, 0, 0, 0, self.more // 2, self.more - self.more // 2),
            )
        return F.relu(x + y)


class ResNet32(nn.Sequential):
    """ResNet-32 for 32-pixel images: 3 stages of 5 blocks, 16/32/64 channels."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
        ]
        channels = 16
        for stage, width in enumerate((16, 32, 64)):
            for block in range(5):
                layers.append(_Block(channels, width, 2 if stage and not block else 1))
                channels = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.num_features = 64
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)


def _without_head(name: str, net: nn.Module) -> nn.Module:
    """A torchvision classifier up to its last linear layer, `num_features` noted."""
    linear = [(n, m) for n, m in net.named_modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise UserError(f"{name} does not end in a linear layer: choose another net")
    place, last = linear[-1]
    parent, _, leaf = place.rpartition(".")
    setattr(net.get_submodule(parent), leaf, nn.Identity())
    net.num_features = last.in_features
    return net


def backbone(name: str, width: int, norm: str, resolution: int) -> nn.Module:
    """A feature extractor [n, 3, R, R] → [n, num_features].

    `width` shapes ConvNets only, `norm` ("instance" or "batch") ConvNets and vgg11_cifar: others
    have one of their own. Raises `UserError` for an unknown name, or images that are too small.
    """
    if name in CONVNETS:
        return ConvNet(CONVNETS[name], width, norm, resolution)
    if name == "resnet32":
        return ResNet32()
    if name == "vgg11_cifar":
        return Vgg11(norm, resolution)
    if name == "alexnet_cifar":
        return AlexNet(resolution)
    import torchvision  # a second of every process's start: only where it is needed

    if name in RESNETS:
        if RESNETS[name] == "instance":
            _need(name, 9, resolution)  # the last maps of smaller ones are one pixel: normalised, 0
        net = torchvision.models.resnet18(norm_layer=partial(_norm, RESNETS[name]))
        net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        net.maxpool = nn.Identity()
        return _without_head(name, net)
    if name not in torchvision.models.list_models(torchvision.models):
        raise UserError(
            f"unknown net {name!r}: one of {', '.join(NAMES)}, or a torchvision "
            "classifier such as resnet50"
        )
    two_outputs = name in ("googlenet", "inception_v3")
    kwargs = {"aux_logits": False, "init_weights": True} if two_outputs else {}
    return _without_head(name, torchvision.models.get_model(name, weights=None, **kwargs))


def check(net: str, width: int, norm: str, resolution: int) -> None:
    """Raise `UserError` where there is no such net, or it cannot take images of this resolution.

    Nothing is computed: the network is built, and shown two images, on the meta device.
    """
    reason = _trial(net, width, norm, resolution)
    if reason:
        raise UserError(
            f"{net} cannot take images of {resolution} pixels: {reason}; "
            "raise data.resolution or choose another net"
        )


@contextmanager
def on_meta(net: str) -> Generator[None]:
    """Networks built here have shapes but no data: their weights and buffers are meta tensors.

    (Not by ``torch.device("meta")`` for torchvision's: RegNet computes its widths with tensors.)
    """
    if net in CONVNETS:  # of any width, even one that no machine could hold
        with torch.device("meta"):
            yield
        return

    def weight(_: nn.Module, __: str, value: nn.Parameter | None) -> nn.Parameter | None:
        return None if value is None else nn.Parameter(value.to("meta"), value.requires_grad)

    def buffer(_: nn.Module, __: str, value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to("meta")

    handles = (  # of every module that is made, whoever makes it
        register_module_parameter_registration_hook(weight),  # ty: ignore[invalid-argument-type]
        register_module_buffer_registration_hook(buffer),  # ty: ignore[invalid-argument-type]
    )
    try:
        with torch.random.fork_rng(devices=[]):  # some weights are drawn before they get here
            yield
    finally:
        for handle in handles:
            handle.remove()


@cache
def _trial(net: str, width: int, norm: str, resolution: int) -> str:
    """Why `net` cannot take images [2, 3, R, R], empty where it can."""
    with on_meta(net):
        model = TwoHeads(backbone(net, width, norm, resolution), 2, 0).eval()
    try:
        with torch.no_grad():
            model(torch.empty(2, 3, resolution, resolution, device="meta"))
    except (RuntimeError, AssertionError, ValueError) as error:
        return shorten(str(error) or type(error).__name__, 120).rstrip(".!")
    return ""


def width_of(features: nn.Module) -> int:
    """How many features a backbone gives for an image."""
    return cast(int, features.num_features)


class TwoHeads(nn.Module):
    """An expert: backbone, the plain head `fc`, the rebalanced head `fc_cb`, and SimSiam's
    projector and predictor (`projection` wide; 0: none).

    `forward` gives the logits of `fc_cb`, the head used after training, [n, C]; `heads` gives all
    that training needs.
    """

    def __init__(self, features: nn.Module, num_classes: int, projection: int):
        super().__init__()
        self.backbone, d = features, width_of(features)
        self.fc, self.fc_cb = nn.Linear(d, num_classes), nn.Linear(d, num_classes)
        if projection:
            self.projector = nn.Sequential(
                nn.Linear(d, projection, bias=False),
                nn.BatchNorm1d(projection),
                nn.ReLU(inplace=True),
                nn.Linear(projection, projection),
            )
            self.predictor = nn.Sequential(
                nn.Linear(projection, projection // 4, bias=False),
                nn.BatchNorm1d(projection // 4),
                nn.ReLU(inplace=True),
                nn.Linear(projection // 4, projection),
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc_cb(self.backbone(x))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """(logits of fc, logits of fc_cb, projection z, prediction p).

        The last two are None without a projector.
        """
        f = self.backbone(x)
        z = self.projector(f) if hasattr(self, "projector") else None
        return self.fc(f), self.fc_cb(f), z, None if z is None else self.predictor(z)


class Student(nn.Module):
    """Backbone and one linear head."""

    def __init__(self, features: nn.Module, num_classes: int):
        super().__init__()
        self.backbone, self.fc = features, nn.Linear(width_of(features), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.backbone(x))


def seeded(build: Callable[[], M], *key: int | str) -> M:
    """`build()` with initial weights that depend on the key alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(*key))
        return build()


def trains_on_one(network: nn.Module, resolution: int) -> bool:
    """Whether a batch of one image trains `network`. BatchNorm has nothing to learn from one value
    a channel: one image, where maps have shrunk to one pixel. Nothing is computed."""
    if not norm_layers(network):
        return True
    shapes = copy.deepcopy(network).to("meta").train()
    try:
        shapes(torch.empty(1, 3, resolution, resolution, device="meta"))
    except ValueError:
        return False
    return True


def norm_layers(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """BatchNorm layers by name, in forward order for all nets of the registry."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


def conv_layers(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Convolutions by name, the first left out: its input is the image itself."""
    return dict([(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)][1:])
