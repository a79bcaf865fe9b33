"""Stage "calibrate": fair BatchNorm statistics (RLDD §Fair calibration).

With parameters frozen, a pass over the long-tailed set gives per layer and class the count, sum and
sum of squares of the layer's *input*, in float64. The dynamic momentum α_t^c = B_t^c / (N_{t−1}^c +
B_t^c) of the paper, applied to x and x², is exactly sum / count, and that is what is computed.
Every class then weighs the same in the layer's mean and variance.

The observer is given these statistics layer after layer, each measured behind those before it: a
pass a layer, which ends at that layer. Measured all at once they would describe a network that is
not there any more, and every layer would make up again for what the layers before it make up for:
in a deep network that grows from layer to layer, without bound.

A unit of work is a run of whole classes, so each class's sums are added by one rank in one fixed
order, and the all-reduce adds zeros: the same bytes on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ltdd_scale.data import sampling
from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.images import Images, Plan
from ltdd_scale.data.loader import Normalize, open_images, prepare
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.methods.rldd.settings import Calibrate
from ltdd_scale.models import frozen, registry
from ltdd_scale.models.moments import fair_statistics, position_sums
from ltdd_scale.runtime import tensors
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import Ranks
from ltdd_scale.stage import Given

Layers = Mapping[str, nn.Module]


class _Reached(Exception):
    """A forward pass has come to the layer it was made for."""


class ClassMoments:
    """Per-class counts [K], sums and sums of squares [K, channels] of the inputs of `layers`, in
    float64.

    Use as a context manager around forward passes; set `labels` (int64 [n]) before each. Vectorised
    over the batch: one reduction over positions a layer, then a product with the one-hot labels,
    whose order of addition is fixed on a GPU too. With `stop` a forward pass by `see` ends when
    every layer has had its input. The layers are on `device`.
    """

    def __init__(
        self,
        layers: Layers,
        num_classes: int,
        stop: bool = False,
        device: torch.device | str = "cpu",
    ):
        self.layers, self.num_classes, self.stop, self.device = layers, num_classes, stop, device
        self.moments: dict[str, Tensor] = {}  # [K, 1 + 2 · channels]: count, sums, squares
        self._handles: list[Any] = []
        self._seen = 0

    @property
    def labels(self) -> np.ndarray:
        return self._labels

    @labels.setter
    def labels(self, labels: np.ndarray) -> None:
        self._labels = labels
        # Found on the CPU, and sent once a batch, not once a layer: nobody waits for the device.
        classes, local = np.unique(labels, return_inverse=True)
        self._classes = torch.from_numpy(classes).to(self.device, non_blocking=True)
        places = torch.from_numpy(local).to(self.device, non_blocking=True)
        self._onehot = nn.functional.one_hot(places, len(classes)).double().T

    def _hook(self, name: str):
        def collect(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            sums, squares = position_sums(x)
            positions = sums.new_full((len(x), 1), float(x.shape[2] * x.shape[3]))
            rows = torch.cat([positions, sums, squares], 1)
            if name not in self.moments:
                self.moments[name] = rows.new_zeros(self.num_classes, rows.shape[1])
            self.moments[name][self._classes] += self._onehot @ rows
            self._seen += 1
            if self.stop and self._seen == len(self.layers):
                raise _Reached

        return collect

    def see(self, model: nn.Module, x: Tensor, ranks: Ranks) -> None:
        self._seen = 0
        with suppress(_Reached):
            frozen.forward(model, x, ranks)

    def __enter__(self) -> ClassMoments:
        self._handles = [
            layer.register_forward_pre_hook(self._hook(name)) for name, layer in self.layers.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def class_units(counts: np.ndarray, at_least: int) -> list[np.ndarray]:
    """Consecutive classes packed until a unit has `at_least` images: tail classes share a batch, no
    class is cut in two."""
    units, current, held = [], [], 0
    for c, n in enumerate(counts):
        current.append(c)
        held += int(n)
        if held >= at_least:
            units.append(np.asarray(current))
            current, held = [], 0
    return [*units, np.asarray(current)] if current else units


@dataclass(frozen=True)
class Measurement:
    """What a pass over the set needs: the observer, the images as it sees them, and the stage's
    context. `batch_size`: images a forward pass."""

    model: nn.Module
    images: Images
    normalize: Normalize
    spec: ViewSpec
    batch_size: int
    context: Context

    def collect(self, layers: Layers, title: str, stop: bool = False) -> dict[str, Tensor]:
        """One pass over the set, with `stop` up to the last of `layers`.

        Returns the moments of every layer, float64 [K, 1 + 2C], complete on every rank.
        """
        ranks, images = self.context.ranks, self.images
        order = np.argsort(images.labels, kind="stable")
        plans = self._plans(order)
        progress = self.context.progress(title, len(plans), "batches")
        found = ClassMoments(layers, len(images.counts), stop, ranks.device)
        with torch.inference_mode(), found:
            # The layers' shapes are known after a forward pass; a rank without units must hold
            # zeros of the same shapes.
            found.labels = np.zeros(1, np.int64)
            first = next(iter(images.stream([(order[:1], None)], self.spec)))
            found.see(self.model, self.normalize(first), ranks)
            for total in found.moments.values():
                total.zero_()
            batches = images.stream(plans, self.spec)
            for k, ((indices, _), x) in enumerate(zip(plans, batches, strict=True)):
                found.labels = images.labels[indices]
                found.see(self.model, self.normalize(x), ranks)
                progress.update(k + 1)
            return {name: ranks.all_reduce(found.moments[name].contiguous()) for name in layers}

    def _plans(self, order: np.ndarray) -> list[Plan]:
        """This rank's batches: whole units, class after class. `order`: all images by class."""
        ranks, counts, batch = self.context.ranks, self.images.counts, self.batch_size
        units = class_units(counts, batch)
        sizes = np.asarray([counts[u].sum() for u in units])
        edges = np.concatenate([[0], np.cumsum(counts)])
        plans: list[Plan] = []
        for u in sampling.spread(sizes, ranks.world_size)[ranks.rank]:
            members = order[edges[units[u][0]] : edges[units[u][-1] + 1]]
            plans += [(members[i : i + batch], None) for i in range(0, len(members), batch)]
        return plans


def forward_order(model: nn.Module, layers: Layers, x: Tensor) -> list[str]:
    """Names of `layers` in the order in which a forward pass comes to them."""
    names: list[str] = []
    handles = [
        layer.register_forward_pre_hook(lambda *_, name=name: names.append(name))
        for name, layer in layers.items()
    ]
    with torch.inference_mode():
        model(x)
    for handle in handles:
        handle.remove()
    return list(dict.fromkeys(names))


def running(layer: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The running mean and variance of a layer, float32 [C]."""
    assert layer.running_mean is not None and layer.running_var is not None
    return layer.running_mean, layer.running_var


def measure(
    measurement: Measurement,
    norms: Mapping[str, nn.BatchNorm2d],
    convs: Layers,
    settings: Calibrate,
) -> dict[str, Tensor]:
    """The moments of the BatchNorm layers `norms` and the convolutions `convs`, on the CPU.

    With `settings.recalibrate` the observer is given its fair statistics on the way.
    """
    layers = {**norms, **convs}
    moments: dict[str, Tensor] = {}
    if settings.recalibrate:
        size, device = measurement.spec.resolution, measurement.context.ranks.device
        blank = torch.zeros(1, 3, size, size, device=device)
        order = forward_order(measurement.model, norms, blank)
        for number, name in enumerate(order, 1):
            title = f"calibrate, layer {number} of {len(order)}"
            moments.update(measurement.collect({name: norms[name]}, title, stop=True))
            fair = fair_statistics(moments[name], settings.variance)
            for buffer, value in zip(running(norms[name]), fair, strict=True):
                buffer.copy_(value)
        if convs:
            moments.update(measurement.collect(convs, "calibrate, convolutions"))
    else:
        moments = measurement.collect(layers, "calibrate")
    return {name: moments[name].cpu() for name in layers}


def run(settings: Given, context: Context) -> dict[str, Any]:
    """Write ``statistics.pt`` (layer → moments, float64 [K, 1 + 2C]; or layer → mean and var where
    `calibrate.fair` is off) and ``observer.pt``."""
    ranks, calibrate, seen = context.ranks, settings.calibrate, settings.images
    observer = frozen.load(context.input("observer") / "weights.pt", ranks)
    norms = registry.norm_layers(observer.model)
    statistics: dict[str, Any] = {
        "fair": calibrate.fair,
        "batchnorm": list(norms),
        "moments": {},
        "running": {},
    }
    if calibrate.fair:
        split = ShardSplit(context.input("shard"), "train")
        measurement = Measurement(
            observer.model,
            open_images(split, seen, ranks.device, context.workers),
            prepare(split, ranks.device),
            ViewSpec(seen.resolution),
            calibrate.batch_size,
            context,
        )
        convs = registry.conv_layers(observer.model) if calibrate.conv_inputs else {}
        statistics["moments"] = measure(measurement, norms, convs, calibrate)
    for name, layer in norms.items():
        mean, var = running(layer)
        statistics["running"][name] = (mean.cpu(), var.cpu())
    if ranks.is_main:
        tensors.save(context.out / "statistics.pt", statistics)
        frozen.save(context.out / "observer.pt", observer.recipe, observer.model)
    return {"layers": len(norms), "channels": sum(m.num_features for m in norms.values())}
