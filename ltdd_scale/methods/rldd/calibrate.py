"""Stage "calibrate": fair BatchNorm statistics (RLDD §Fair calibration).

With parameters frozen, a pass over the long-tailed set gives per layer and class the count, sum and
sum of squares of the layer's *input*, in float64. The dynamic momentum α_t^c = B_t^c / (N_{t−1}^c +
B_t^c) of the paper, applied to x and x², is exactly sum / count, and that is what is computed.
Every class then weighs the same in the layer's mean and variance.

The observer is given these statistics layer after layer, each measured behind those before it: a
pass a layer, which ends at that layer. Measured all at once they would describe a network that is
not there any more, and every layer would make up again for what the layers before it make up for:
in a deep network that grows from layer to layer, without bound. With `calibrate.lead` a few images
of each class go layer after layer, and a few passes over all images correct them (`led`).

A unit of work is a run of whole classes, so each class's sums are added by one rank in one fixed
order, and the all-reduce adds zeros: the same bytes on any number of ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ltdd_scale.data import sampling
from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.images import Images, Plan
from ltdd_scale.data.kept import Kept
from ltdd_scale.data.loader import Normalize, open_images, prepare
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.methods.rldd.settings import Calibrate
from ltdd_scale.models import frozen, registry
from ltdd_scale.models.moments import fair_statistics, position_sums
from ltdd_scale.runtime import tensors
from ltdd_scale.runtime.checkpoint import Checkpoints
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import Ranks, rng
from ltdd_scale.stage import Given

Layers = Mapping[str, nn.Module]
CLOSE = 1e-3  # deviations by which a led layer may miss the statistics of what it sees
TURNS = 8  # of the lead and all images, at most
LONG = 10.0  # seconds of a pass that is worth keeping


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


class Passes:
    """What the passes of this stage have found, in their order: one that took long is kept on the
    disk, so that a stage which is interrupted goes on at the pass. Buffers follow from what passes
    find, so those that are taken from there lead to the same ones."""

    def __init__(self, context: Context):
        self.context, self.number = context, 0

    def take(self, collect: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The moments of the next pass: kept ones, or what `collect` finds now."""
        ranks, self.number = self.context.ranks, self.number + 1
        kept = self._kept(self.number)
        found = kept.load(ranks.device) if ranks.is_main else None
        if ranks.broadcast(found is not None):
            # Rank 0 has seen that it is whole.
            return (found or kept.load(ranks.device, step=1))[1]  # ty: ignore[not-subscriptable]
        begin = time.monotonic()
        moments = collect()
        if ranks.is_main and time.monotonic() - begin >= LONG:
            kept.save(1, moments, wait=True)
        return moments

    def _kept(self, number: int) -> Checkpoints:
        return self.context.checkpoints(f"pass-{number:04d}")


@dataclass(frozen=True)
class Measurement:
    """What a pass over real images needs: the observer, the images as it sees them, and the stage's
    context.

    `batch_size`: images a forward pass. `members`: the images of each class that are looked at, all
    where it is left out. Decoded images are kept, up to `memory` bytes of them in memory. `passes`
    keeps what long passes found.
    """

    model: nn.Module
    images: Images
    normalize: Normalize
    spec: ViewSpec
    batch_size: int
    context: Context
    memory: float = 0.0
    members: list[np.ndarray] | None = None
    passes: Passes | None = None

    @cached_property
    def plans(self) -> list[Plan]:
        """This rank's batches: whole units, class after class."""
        ranks, batch = self.context.ranks, self.batch_size
        members = self.members or by_class(self.images)
        units = class_units(np.asarray([len(m) for m in members]), batch)
        sizes = np.asarray([sum(len(members[c]) for c in unit) for unit in units])
        plans: list[Plan] = []
        for u in sampling.spread(sizes, ranks.world_size)[ranks.rank]:
            own = np.concatenate([members[c] for c in units[u]])
            plans += [(own[i : i + batch], None) for i in range(0, len(own), batch)]
        return plans

    @cached_property
    def batches(self) -> Kept:
        context = self.context
        made_of = self.images, self.plans, self.spec, context.ranks.device
        return Kept(*made_of, self.memory, context.say)

    def collect(self, layers: Layers, title: str, stop: bool = False) -> dict[str, Tensor]:
        """One pass over the images, with `stop` up to the last of `layers`.

        Returns the moments of every layer, float64 [K, 1 + 2C], complete on every rank.
        """
        if self.passes is None:
            return self._collect(layers, title, stop)
        return self.passes.take(lambda: self._collect(layers, title, stop))

    def _collect(self, layers: Layers, title: str, stop: bool) -> dict[str, Tensor]:
        ranks, images = self.context.ranks, self.images
        progress = self.context.progress(title, len(self.plans), "batches")
        found = ClassMoments(layers, len(images.counts), stop, ranks.device)
        with torch.inference_mode(), found:
            # The layers' shapes are known after a forward pass; a rank without units must hold
            # zeros of the same shapes.
            found.labels = np.zeros(1, np.int64)
            first = next(iter(images.stream([(np.zeros(1, np.int64), None)], self.spec)))
            found.see(self.model, self.normalize(first), ranks)
            for total in found.moments.values():
                total.zero_()
            for k, ((indices, _), x) in enumerate(zip(self.plans, self.batches, strict=True)):
                found.labels = images.labels[indices]
                found.see(self.model, self.normalize(x), ranks)
                progress.update(k + 1)
            ranks.barrier()  # on the CPUs, where a slow rank may be waited for long
            return {name: ranks.all_reduce(found.moments[name].contiguous()) for name in layers}


def by_class(images: Images, per_class: int = 0, seed: int = 0) -> list[np.ndarray]:
    """The images of each class, in order; at most `per_class` of them (0: all), drawn by `seed`."""
    order = np.argsort(images.labels, kind="stable")
    members = np.split(order, np.cumsum(images.counts)[:-1])
    if not per_class:
        return members
    drawn = [rng(seed, "lead", c).permutation(m)[:per_class] for c, m in enumerate(members)]
    return [np.sort(m) for m in drawn]


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


Fair = tuple[Tensor, Tensor]  # mean and variance, float64 [C]


def layer_by_layer(
    measurement: Measurement,
    norms: Mapping[str, nn.BatchNorm2d],
    variance: str,
    title: str,
    shift: Mapping[str, Fair] | None = None,
) -> dict[str, Tensor]:
    """Give each of `norms` the fair statistics of what it sees behind those before it, a pass each.

    `shift`: what is added to each mean, and what each variance is multiplied with, with its ε, or
    one of zero would stay. Returns the moments.
    """
    size, device = measurement.spec.resolution, measurement.context.ranks.device
    blank = torch.zeros(1, 3, size, size, device=device)
    order, moments = forward_order(measurement.model, norms, blank), {}
    for number, name in enumerate(order, 1):
        this = f"{title}, layer {number} of {len(order)}"
        moments.update(measurement.collect({name: norms[name]}, this, stop=True))
        mean, var = fair_statistics(moments[name], variance)
        if shift is not None:
            far, ratio = shift[name]
            mean, var = mean + far, (var + norms[name].eps) * ratio - norms[name].eps
        for buffer, value in zip(running(norms[name]), (mean, var.clamp(min=0)), strict=True):
            buffer.copy_(value)
    return moments


def led(
    whole: Measurement,
    lead: Measurement,
    norms: Mapping[str, nn.BatchNorm2d],
    layers: Layers,
    variance: str,
) -> tuple[dict[str, Tensor], float]:
    """What `layer_by_layer` and a pass over `layers` find, in few passes over all images.

    The images of `lead` go layer by layer. A pass over all images then tells how far the statistics
    of all are from those of the lead; that difference hardly depends on the buffers, so the lead
    goes again with it. This ends when the buffers are the statistics of what their layers see, but
    for `CLOSE`, or when it is plain that `TURNS` will not do. Returns the moments and how far they
    are off at most, in deviations (of a variance: as a share).
    """
    shift = {
        name: (torch.zeros_like(mean).double(), torch.ones_like(var).double())
        for name, (mean, var) in ((name, running(layer)) for name, layer in norms.items())
    }
    moments: dict[str, Tensor] = {}
    off = float("inf")
    for turn in range(1, TURNS + 1):
        before = off
        layer_by_layer(lead, norms, variance, f"calibrate, lead {turn}", shift)
        moments = whole.collect(layers, f"calibrate, all images {turn}")
        off = 0.0
        for name, layer in norms.items():
            mean, var = fair_statistics(moments[name], variance)
            given_mean, given_var = (value.double() for value in running(layer))
            scale = var + layer.eps
            far, ratio = mean - given_mean, (var + layer.eps) / (given_var + layer.eps)
            off = max(off, float((far.abs() / scale.sqrt()).max()), float((ratio - 1).abs().max()))
            shift[name] = shift[name][0] + far, shift[name][1] * ratio
        whole.context.say(f"calibrate: off by {off:.4f} deviations at most after turn {turn}")
        pace = off / before  # of the first turn 0: nothing is known
        if off <= CLOSE or off * pace ** (TURNS - turn) > CLOSE:
            break
    return moments, off


def measure(
    whole: Measurement,
    lead: Measurement | None,
    norms: Mapping[str, nn.BatchNorm2d],
    convs: Layers,
    settings: Calibrate,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The moments of the BatchNorm layers `norms` and the convolutions `convs`, on the CPU, and
    what is to be said of them.

    With `settings.recalibrate` the observer is given its fair statistics on the way.
    """
    layers, facts = {**norms, **convs}, {}
    if not settings.recalibrate:
        moments = whole.collect(layers, "calibrate")
    elif lead is not None:
        moments, off = led(whole, lead, norms, layers, settings.variance)
        facts = {"off": round(off, 6)}
        if off > CLOSE:
            whole.context.say(
                f"calibrate: {settings.lead} images a class do not lead (off by {off:.4f}, goal "
                f"{CLOSE}): all images go layer by layer; a larger calibrate.lead may do"
            )
            lead, facts = None, {"lead given up": round(off, 6)}
    if settings.recalibrate and lead is None:
        moments = layer_by_layer(whole, norms, settings.variance, "calibrate")
        if convs:
            moments.update(whole.collect(convs, "calibrate, convolutions"))
    return {name: moments[name].cpu() for name in layers}, facts


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
    facts: dict[str, Any] = {}
    if calibrate.fair:
        split = ShardSplit(context.input("shard"), "train")
        images = open_images(split, seen, ranks.device, context.workers)
        normalize, spec = prepare(split, ranks.device), ViewSpec(seen.resolution)
        how = calibrate.batch_size, context, seen.memory_gb * 2**30
        passes, lead = Passes(context), None
        whole = Measurement(observer.model, images, normalize, spec, *how, passes=passes)
        if calibrate.lead:
            lead = replace(whole, members=by_class(images, calibrate.lead, settings.seed))
        convs = registry.conv_layers(observer.model) if calibrate.conv_inputs else {}
        statistics["moments"], facts = measure(whole, lead, norms, convs, calibrate)
    for name, layer in norms.items():
        mean, var = running(layer)
        statistics["running"][name] = (mean.cpu(), var.cpu())
    if ranks.is_main:
        tensors.save(context.out / "statistics.pt", statistics)
        frozen.save(context.out / "observer.pt", observer.recipe, observer.model)
    channels = sum(m.num_features for m in norms.values())
    return {"layers": len(norms), "channels": channels, **facts}
