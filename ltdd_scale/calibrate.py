"""Stage "calibrate": fair BatchNorm statistics (RLDD §Fair calibration).

With parameters frozen, a pass over the long-tailed set gives per layer and class the count, sum and sum of squares of the layer's
*input*, in float64. The dynamic momentum α_t^c = B_t^c / (N_{t−1}^c + B_t^c) of the paper, applied to x and x², is exactly sum / count,
and that is what is computed. Every class then weighs the same in the layer's mean and variance.

The observer is given these statistics layer after layer, each measured behind those before it: a pass a layer, which ends at that layer. Measured all at
once they would describe a network that is not there any more, and every layer would make up again for what the layers before it make up for: in a deep
network that grows from layer to layer, without bound.

A unit of work is a run of whole classes, so each class's sums are added by one rank in one fixed order, and the all-reduce
adds zeros: the same bytes on any number of ranks.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ltdd_scale.config import Config
from ltdd_scale.data import sampling
from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.loader import normalizer, open_images
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.models import registry
from ltdd_scale.models.moments import fair_statistics, position_sums
from ltdd_scale.runtime import tensors
from ltdd_scale.runtime.context import Context


class _Reached(Exception):
    """A forward pass has come to the layer it was made for."""


class ClassMoments:
    """Per-class counts [K], sums and sums of squares [K, channels] of the inputs of `layers`, in float64.

    Use as a context manager around forward passes; set `labels` (int64 [n]) before each. Vectorised over the batch: one reduction
    over positions a layer, then a product with the one-hot labels, whose order of addition is fixed on a GPU too. With `stop` a forward pass by
    `see` ends when every layer has had its input.
    """

    def __init__(
        self,
        layers: dict[str, nn.Module],
        num_classes: int,
        device: torch.device,
        stop: bool = False,
    ):
        self.layers, self.num_classes, self.device, self.stop = layers, num_classes, device, stop
        self.moments: dict[str, Tensor] = {}  # [K, 1 + 2 · channels]: count, sums, sums of squares
        self._handles: list[Any] = []
        self._seen = 0

    @property
    def labels(self) -> Tensor:
        return self._labels

    @labels.setter
    def labels(self, labels: Tensor) -> None:
        self._labels = labels
        self._classes, local = torch.unique(
            labels, return_inverse=True
        )  # once a batch, not once a layer: it waits for the device
        self._onehot = nn.functional.one_hot(local, len(self._classes)).double().T

    def _hook(self, name: str):
        def collect(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            if name not in self.moments:
                self.moments[name] = torch.zeros(
                    self.num_classes, 1 + 2 * x.shape[1], dtype=torch.float64, device=self.device
                )
            sums, squares = position_sums(x)
            positions = torch.full(
                (len(x), 1), float(x.shape[2] * x.shape[3]), dtype=torch.float64, device=x.device
            )
            self.moments[name][self._classes] += self._onehot @ torch.cat(
                [positions, sums, squares], 1
            )
            self._seen += 1
            if self.stop and self._seen == len(self.layers):
                raise _Reached

        return collect

    def see(self, model: nn.Module, x: Tensor) -> None:
        self._seen = 0
        with suppress(_Reached):
            model(x)

    def __enter__(self) -> ClassMoments:
        self._handles = [
            layer.register_forward_pre_hook(self._hook(name)) for name, layer in self.layers.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def class_units(counts: np.ndarray, at_least: int) -> list[np.ndarray]:
    """Consecutive classes packed until a unit has `at_least` images: tail classes share a batch, no class is cut in two."""
    units, current, held = [], [], 0
    for c, n in enumerate(counts):
        current.append(c)
        held += int(n)
        if held >= at_least:
            units.append(np.asarray(current))
            current, held = [], 0
    return [*units, np.asarray(current)] if current else units


def collect(
    model: nn.Module,
    layers: dict[str, nn.Module],
    images,
    normalize,
    settings,
    context: Context,
    title: str,
    spec: ViewSpec,
    stop: bool = False,
) -> dict[str, Tensor]:
    """One pass over `images`, with `stop` up to the last of `layers`; the moments of every layer, complete on every rank."""
    ranks, num_classes = context.ranks, len(images.counts)
    units = class_units(images.counts, settings.batch_size)
    mine = sampling.spread(np.asarray([images.counts[u].sum() for u in units]), ranks.world)[
        ranks.rank
    ]
    order = np.argsort(images.labels, kind="stable")
    edges = np.concatenate([[0], np.cumsum(images.counts)])
    plans = []
    for u in mine:
        members = order[edges[units[u][0]] : edges[units[u][-1] + 1]]
        plans += [
            (members[i : i + settings.batch_size], None)
            for i in range(0, len(members), settings.batch_size)
        ]
    progress = context.progress(title, len(plans), "batches")
    with torch.inference_mode(), ClassMoments(layers, num_classes, ranks.device, stop) as found:
        # The layers' shapes are known after a forward pass; a rank without units must hold zeros of the same shapes.
        found.labels = torch.zeros(1, dtype=torch.int64, device=ranks.device)
        first = next(iter(images.stream([(order[:1], None)], spec)))
        found.see(model, normalize(first))
        for total in found.moments.values():
            total.zero_()
        for k, ((indices, _), x) in enumerate(zip(plans, images.stream(plans, spec), strict=True)):
            found.labels = torch.from_numpy(images.labels[indices]).to(ranks.device)
            with ranks.autocast():
                found.see(model, normalize(x))
            progress.update(k + 1)
        return {name: ranks.sum_(found.moments[name].contiguous()) for name in layers}


def forward_order(model: nn.Module, layers: dict[str, nn.Module], x: Tensor) -> list[str]:
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


def run(config: Config, context: Context) -> dict[str, Any]:
    """Write ``statistics.pt`` (layer → moments, float64 [K, 1 + 2C]; or layer → mean and var without calibration) and ``observer.pt``."""
    ranks, settings, size = context.ranks, config.calibrate, config.data.resolution
    saved = tensors.load(context.input("observer") / "weights.pt")
    model = ranks.to_device(registry.Network.build(saved["recipe"], saved["model"]))
    norms = registry.norm_layers(model)
    statistics: dict[str, Any] = {
        "fair": config.strategies.calibrate,
        "batchnorm": list(norms),
        "moments": {},
        "running": {},
    }
    if config.strategies.calibrate:
        split = ShardSplit(context.input("shard"), "train")
        images = open_images(split, config, ranks.device)
        normalize = normalizer(split.mean, split.std, ranks.device)
        convs = registry.conv_layers(model) if settings.conv_inputs else {}

        def measure(layers: dict[str, nn.Module], title: str, stop: bool) -> dict[str, Tensor]:
            return collect(
                model, layers, images, normalize, settings, context, title, ViewSpec(size), stop
            )

        if settings.recalibrate:
            moments: dict[str, Tensor] = {}
            order = forward_order(model, norms, torch.zeros(1, 3, size, size, device=ranks.device))
            for number, name in enumerate(order, 1):
                moments.update(
                    measure(
                        {name: norms[name]}, f"calibrate, layer {number} of {len(order)}", stop=True
                    )
                )
                mean, var = fair_statistics(moments[name], settings.variance)
                norms[name].running_mean.copy_(mean)
                norms[name].running_var.copy_(var)
            if convs:
                moments.update(measure(convs, "calibrate, convolutions", stop=False))
        else:
            moments = measure({**norms, **convs}, "calibrate", stop=False)
        statistics["moments"] = {name: moments[name].cpu() for name in {**norms, **convs}}
    for name, layer in norms.items():
        statistics["running"][name] = (layer.running_mean.cpu(), layer.running_var.cpu())
    if ranks.first:
        tensors.save(context.out / "statistics.pt", statistics)
        weights = {k: v.cpu().contiguous() for k, v in model.state_dict().items()}
        tensors.save(context.out / "observer.pt", {"recipe": saved["recipe"], "model": weights})
    return {"layers": len(norms), "channels": sum(m.num_features for m in norms.values())}
