"""Networks by name: ConvNet-3/4, ResNet-32, CIFAR-stem ResNet-18, any torchvision classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltdd_scale.errors import UserError
from ltdd_scale.runtime.ranks import torch_seed

CONVNETS = {"convnet3": 3, "convnet4": 4}


def _norm(kind: str, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(channels, channels)


class ConvNet(nn.Sequential):
    """The field's ConvNet: `depth` blocks of 3×3 convolution, normalisation, ReLU, 2×2 average pooling (DC, ICLR 2021).

    Instance normalisation is GroupNorm with one channel a group, as in the reference implementation (affine, no running statistics).
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
        if not self.num_features:
            raise UserError(
                f"convnet{depth} needs images of at least {2**depth} pixels, data.resolution is {resolution}"
            )


class _Block(nn.Module):
    """Basic block of the CIFAR ResNets with the parameter-free shortcut (option A) of He et al. 2016."""

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


def _without_head(net: nn.Module) -> nn.Module:
    """A torchvision classifier up to its last linear layer, `num_features` noted."""
    name, last = [(n, m) for n, m in net.named_modules() if isinstance(m, nn.Linear)][-1]
    parent, _, leaf = name.rpartition(".")
    holder = net.get_submodule(parent)
    if isinstance(holder, nn.Sequential):
        holder[int(leaf) if leaf.isdigit() else list(dict(holder.named_children())).index(leaf)] = (
            nn.Identity()
        )
    else:
        setattr(holder, leaf, nn.Identity())
    net.num_features = last.in_features
    return net


def backbone(name: str, width: int, norm: str, resolution: int) -> nn.Module:
    """A feature extractor [n, 3, R, R] → [n, num_features]. Raises `UserError` for an unknown name."""
    if name in CONVNETS:
        return ConvNet(CONVNETS[name], width, norm, resolution)
    if name == "resnet32":
        return ResNet32()
    import torchvision  # a second of every process's start: only where it is needed

    if name == "resnet18_cifar":
        net = torchvision.models.resnet18()
        net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        net.maxpool = nn.Identity()
        return _without_head(net)
    if name not in torchvision.models.list_models(torchvision.models):
        raise UserError(
            f"unknown net {name!r}: one of {', '.join(CONVNETS)}, resnet32, resnet18_cifar, or a torchvision classifier such as resnet50"
        )
    kwargs = (
        {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    )
    return _without_head(torchvision.models.get_model(name, weights=None, **kwargs))


class TwoHeads(nn.Module):
    """An expert: backbone, the plain head `fc`, the rebalanced head `fc_cb`, and SimSiam's projector and predictor.

    `forward` gives the logits of `fc_cb`, the head used after training; `heads` gives all that training needs.
    """

    def __init__(self, features: nn.Module, num_classes: int, projection: int):
        super().__init__()
        self.backbone, d = features, features.num_features
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
        """(logits of fc, logits of fc_cb, projection z, prediction p), the last two None without a projector."""
        f = self.backbone(x)
        z = self.projector(f) if hasattr(self, "projector") else None
        return self.fc(f), self.fc_cb(f), z, None if z is None else self.predictor(z)


class Student(nn.Module):
    """Backbone and one linear head."""

    def __init__(self, features: nn.Module, num_classes: int):
        super().__init__()
        self.backbone, self.fc = features, nn.Linear(features.num_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.backbone(x))


def seeded(build, *key: int | str) -> nn.Module:
    """`build()` with initial weights that depend on the key alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(*key))
        return build()


class Network:
    """What a saved network is made of, so that another stage can build it again: the recipe travels with the weights."""

    @staticmethod
    def describe(name: str, width: int, norm: str, resolution: int, num_classes: int) -> dict:
        return {
            "net": name,
            "width": width,
            "norm": norm,
            "resolution": resolution,
            "num_classes": num_classes,
        }

    @staticmethod
    def build(recipe: dict, weights: dict) -> TwoHeads:
        """The expert of a saved recipe, frozen and in eval mode, without what only training needed."""
        model = TwoHeads(
            backbone(recipe["net"], recipe["width"], recipe["norm"], recipe["resolution"]),
            recipe["num_classes"],
            0,
        )
        model.load_state_dict(
            {k: v for k, v in weights.items() if not k.startswith(("projector", "predictor"))}
        )
        return model.eval().requires_grad_(False)


def norm_layers(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """BatchNorm layers by name, in forward order for all nets of the registry."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


def conv_layers(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Convolutions by name, the first left out: its input is the image itself."""
    return dict([(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)][1:])


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Parameters and float buffers of `average` ← decay · average + (1 − decay) · model."""
    ours, theirs = list(average.state_dict().values()), list(model.state_dict().values())
    floats = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.is_floating_point()]
    torch._foreach_lerp_([a for a, _ in floats], [b for _, b in floats], 1 - decay)
    for a, b in zip(ours, theirs, strict=True):
        if not a.is_floating_point():
            a.copy_(b)
