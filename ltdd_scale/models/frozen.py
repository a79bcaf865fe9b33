"""A trained network as a function from images to logits.

The only file that loads trained weights, and the only place where the memory layout and the
precision of a forward pass are chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.images import Images
from ltdd_scale.models import registry, safe
from ltdd_scale.runtime import signals, tensors
from ltdd_scale.runtime.ranks import Ranks

TRAINING_ONLY = ("projector", "predictor")  # parts of an expert that nothing reads after training
MEAN = "mean"  # the "net" in the recipe of several networks whose logits are averaged


def recipe(net: str, width: int, norm: str, resolution: int, num_classes: int) -> dict[str, Any]:
    """What a network is made of. It is saved with the weights, so that any stage can build it."""
    return {
        "net": net,
        "width": width,
        "norm": norm,
        "resolution": resolution,
        "num_classes": num_classes,
    }


def save(path: Path, net_recipe: dict[str, Any], model: nn.Module) -> None:
    """Write the weights of `model`. Equal weights give equal bytes, on any device."""
    write(path, net_recipe, dict(model.state_dict()))


def write(path: Path, net_recipe: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Write ``{"recipe", "model"}``, or safetensors where `path` ends so."""
    if path.suffix == safe.SUFFIX:
        safe.save(path, net_recipe, weights)
        return
    weights = {name: value.cpu().contiguous() for name, value in weights.items()}
    tensors.save(path, {"recipe": net_recipe, "model": weights})


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(recipe, weights) as they were written, on the CPU, without what only training needed.

    Raises `UserError` where the file is missing or damaged.
    """
    if path.suffix == safe.SUFFIX:
        made_of, weights = safe.load(path)
    else:
        saved = tensors.load(path)
        made_of, weights = saved["recipe"], saved["model"]
    return made_of, {k: v for k, v in weights.items() if not k.startswith(TRAINING_ONLY)}


def read_mean(paths: Sequence[Path]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(recipe, weights) of one network: that in the only path, or the mean of the logits of those
    in all. Its recipe has theirs, in order, as "of"."""
    if len(paths) == 1:
        return read(paths[0])
    found = [read(path) for path in paths]
    same = {name: found[0][0][name] for name in ("resolution", "num_classes")}
    weights = {f"{k}.{n}": value for k, (_, own) in enumerate(found) for n, value in own.items()}
    return {"net": MEAN, "of": [made_of for made_of, _ in found], **same}, weights


def channels_last(x: Tensor) -> Tensor:
    """`x` [n, C, H, W] in the layout that convolutions of its device like best."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cuda" else x


def forward(model: nn.Module, x: Tensor, ranks: Ranks) -> Tensor:
    """Logits float32 [n, C] of normalised images [n, 3, R, R]; gradients flow."""
    x = channels_last(x)
    with ranks.autocast():
        return model(x).float()


@dataclass(frozen=True)
class Frozen:
    """A trained network, in eval mode and without gradients of its weights.

    `recipe` is what it was saved with. `logits` and `plain_logits` take normalised images
    float [n, 3, R, R] and give float32 [n, C], without gradients.
    """

    model: nn.Module
    recipe: dict[str, Any]
    ranks: Ranks

    @property
    def any_size(self) -> bool:
        """Whether it takes images of any other side than the one it was trained on."""
        parts = self.recipe.get("of", [self.recipe])
        return all(part["net"] not in registry.ONE_SIDE for part in parts)

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        return forward(self.model, x, self.ranks)

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """What its last linear layer sees, float32 [n, d]."""
        network: Any = self.model
        with self.ranks.autocast():
            return network.backbone(channels_last(x)).float()

    @torch.no_grad()
    def features_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`features` and `logits` of one pass."""
        network: Any = self.model
        seen: list[Tensor] = []
        hook = network.backbone.register_forward_hook(lambda *call: seen.append(call[-1]))
        try:
            logits = forward(network, x, self.ranks)
        finally:
            hook.remove()
        return seen[0].float(), logits

    @torch.no_grad()
    def plain_logits(self, x: Tensor) -> Tensor:
        """Of the head `fc`, which the recipe glmc trains; the other leaves it as it was drawn."""
        x = channels_last(x)
        with self.ranks.autocast():
            expert: Any = self.model  # one with two heads
            return expert.fc(expert.backbone(x)).float()


def load(path: Path, ranks: Ranks) -> Frozen:
    """The network in `path`, on the device of `ranks`, without what only its training needed.

    Raises `UserError` where the file is missing or damaged.
    """
    return load_mean([path], ranks)


def load_mean(paths: Sequence[Path], ranks: Ranks) -> Frozen:
    """The network in the only path, or one whose logits are the mean of those of all. As `load`."""
    made_of, weights = read_mean(paths)
    model = _build(made_of, set(weights))
    model.load_state_dict(weights)
    model = ranks.to_device(model).eval().requires_grad_(False)
    return Frozen(model, made_of, ranks)


def same(a: Frozen, b: Frozen) -> bool:
    """Whether two networks are one: made alike, with equal weights and buffers. Waits for them."""
    ours, theirs = a.model.state_dict(), b.model.state_dict()
    return (
        a.recipe == b.recipe
        and ours.keys() == theirs.keys()
        and all(torch.equal(ours[name], theirs[name]) for name in ours)
    )


class _Mean(nn.ModuleList):
    """The mean of several networks' logits: softmax gives the normalised geometric mean of their
    probabilities."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([network(x).float() for network in self]).mean(0)


def _build(made_of: dict[str, Any], names: set[str]) -> nn.Module:
    """The network of a recipe, `names` being those of its weights."""
    if made_of["net"] == MEAN:
        return _Mean(
            _build(part, {n.removeprefix(f"{k}.") for n in names if n.startswith(f"{k}.")})
            for k, part in enumerate(made_of["of"])
        )
    features = registry.backbone(
        made_of["net"], made_of["width"], made_of["norm"], made_of["resolution"]
    )
    if "fc_cb.weight" in names:
        return registry.TwoHeads(features, made_of["num_classes"], 0)
    return registry.Student(features, made_of["num_classes"])


def together(side: int) -> int:
    """Images of `side` pixels that a trained network is shown at a time: 500 of up to 64, and as
    many pixels of larger ones, 40 of 224: the maps of 500 would need tens of gigabytes."""
    return max(1, min(500, 500 * 64**2 // side**2))


@torch.no_grad()
def predict(
    network: Frozen | nn.Module | Callable[[Tensor], Tensor],
    images: Images,
    normalize: Callable[[Tensor], Tensor],
    ranks: Ranks,
    batch: int | None = None,
) -> Tensor:
    """Logits float32 [N, C] on the CPU, every image of `images` once, `batch` (default: `together`)
    at a time.

    `network` is a `Frozen`, a module in eval mode, or a function such as `Frozen.plain_logits`.
    """
    logits = _function(network, ranks)
    n, batch = len(images.labels), batch or together(images.resolution)
    plans = [(np.arange(i, min(i + batch, n)), None) for i in range(0, n, batch)]
    out: Tensor | None = None
    for start, x in zip(range(0, n, batch), images.stream(plans, ViewSpec(1)), strict=True):
        signals.check()
        found = logits(normalize(x)).cpu()
        if out is None:  # all of it at once: to put parts together would take as much again
            out = torch.empty(n, found.shape[1])
        out[start : start + batch] = found
    assert out is not None, "no image to judge"
    return out


def _function(network: Any, ranks: Ranks) -> Callable[[Tensor], Tensor]:
    if isinstance(network, Frozen):
        return network.logits
    if isinstance(network, nn.Module):
        return lambda x: forward(network, x, ranks)
    return network
