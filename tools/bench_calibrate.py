"""Calibration against a bare forward pass over the same loader, and the per-class loop it replaces.

python tools/bench_calibrate.py [--rounds 5] [--threads 1]
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from bench import begin, in_turns, table

from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.images import MemoryImages
from ltdd_scale.data.loader import normalizer
from ltdd_scale.methods.rldd.calibrate import Measurement
from ltdd_scale.models import registry
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import Ranks


def per_class_loop(model, layers, images, normalize, batch: int, spec: ViewSpec) -> None:
    """The plain formulation, over the shuffled loader that it comes with: in every hook, for every class of the batch, select its rows and reduce them in float64."""
    state: dict = {}
    labels = None

    def hook(name):
        def collect(_, inputs):
            x = inputs[0].detach()
            for c in labels.unique().tolist():
                rows = x[labels == c].double()
                count, total, square = state.get((name, c), (0, 0, 0))
                state[name, c] = (
                    count + rows.numel() // rows.shape[1],
                    total + rows.sum((0, 2, 3)),
                    square + (rows**2).sum((0, 2, 3)),
                )

        return collect

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    order = np.random.default_rng(1).permutation(len(images.labels))
    plans = [(order[i : i + batch], None) for i in range(0, len(order), batch)]
    with torch.inference_mode():
        for (indices, _), x in zip(plans, images.stream(plans, spec), strict=True):
            labels = torch.from_numpy(images.labels[indices]).to(x.device)
            model(normalize(x))
    for handle in handles:
        handle.remove()


def bench(ranks: Ranks, rounds: int, net: str, width: int, size: int, n: int, classes: int) -> str:
    """The table of one network. Images are noise, since only the time matters."""
    device, batch, spec = ranks.device, min(n, 64), ViewSpec(size)
    generator = np.random.default_rng(0)
    labels = np.minimum(generator.exponential(classes / 5, n).astype(int), classes - 1)
    pixels = generator.integers(0, 256, (n, 3, size, size), dtype=np.uint8)
    images = MemoryImages(pixels, np.sort(labels), device)
    normalize = normalizer([0.5] * 3, [0.25] * 3, device)

    def build() -> torch.nn.Module:
        return registry.TwoHeads(registry.backbone(net, width, "batch", size), classes, 0)

    model = ranks.to_device(registry.seeded(build, "bench").eval())
    layers = registry.norm_layers(model)
    plans = [(np.arange(i, min(i + batch, n)), None) for i in range(0, n, batch)]
    context = Context(ranks, Path("has no folder"), {}, "bench", quiet=True)
    measurement = Measurement(model, images, normalize, spec, batch, context)

    def bare() -> None:
        with torch.inference_mode():
            for x in images.stream(plans, spec):
                model(normalize(x))

    candidates = {
        "bare forward pass": bare,
        "calibration": lambda: measurement.collect(layers, ""),
        "per-class loop": lambda: per_class_loop(model, layers, images, normalize, batch, spec),
    }
    title = f"{net} at {size} px, {n} images, {classes} classes"
    return table(title, in_turns(candidates, rounds), "bare forward pass", n, "images")


def main() -> None:
    rounds, ranks = begin(__doc__)
    for net, width, size, n, classes in (
        ("convnet3", 64, 32, 1024, 10),
        ("resnet18_cifar", 0, 32, 128, 100),
        ("resnet18", 0, 224, 64, 100),
        ("resnet50", 0, 224, 64, 1000),
    ):
        print(bench(ranks, rounds, net, width, size, n, classes), flush=True)


if __name__ == "__main__":
    main()
