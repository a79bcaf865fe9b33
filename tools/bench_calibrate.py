"""Calibration against a bare forward pass over the same loader, and against the per-class loop it replaces.

python tools/bench_calibrate.py [--rounds 5] [--threads 1]
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from bench import begin, in_turns, table

from ltdd_scale import calibrate
from ltdd_scale.config import Calibrate
from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.loader import MemoryImages, normalizer
from ltdd_scale.models import registry
from ltdd_scale.runtime.context import Context


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


def main() -> None:
    rounds, ranks = begin(__doc__)
    device = ranks.device
    context = Context(ranks, Path("."), {}, "bench", 1e9, quiet=True)
    normalize = normalizer([0.5] * 3, [0.25] * 3, device)
    # (net, width, pixels, images, classes): images are noise, since only the time matters
    for net, width, size, n, num_classes in (
        ("convnet3", 64, 32, 1024, 10),
        ("resnet18_cifar", 0, 32, 128, 100),
        ("resnet18", 0, 224, 64, 100),
        ("resnet50", 0, 224, 64, 1000),
    ):
        batch = min(n, 64)
        generator = np.random.default_rng(0)
        labels = np.sort(
            np.minimum(generator.exponential(num_classes / 5, n).astype(int), num_classes - 1)
        )
        images = MemoryImages(
            generator.integers(0, 256, (n, 3, size, size), dtype=np.uint8), labels, device
        )
        model = ranks.to_device(
            registry.seeded(
                lambda: registry.TwoHeads(
                    registry.backbone(net, width, "batch", size), num_classes, 0
                ),
                "bench",
            ).eval()
        )  # noqa: B023
        layers, spec = registry.norm_layers(model), ViewSpec(size)
        images.counts = np.bincount(labels, minlength=num_classes)
        images.counts = images.counts[: labels.max() + 1]
        plans = [(np.arange(i, min(i + batch, n)), None) for i in range(0, n, batch)]

        def bare():
            with torch.inference_mode():
                for x in images.stream(plans, spec):  # noqa: B023
                    model(normalize(x))  # noqa: B023

        settings = Calibrate(batch_size=batch)
        times = in_turns(
            {
                "bare forward pass": bare,
                "calibration": lambda: calibrate.collect(
                    model, layers, images, normalize, settings, context, "", spec
                ),  # noqa: B023
                "per-class loop": lambda: per_class_loop(
                    model, layers, images, normalize, batch, spec
                ),  # noqa: B023
            },
            rounds,
        )
        print(
            table(
                f"{net} at {size} px, {n} images, {num_classes} classes",
                times,
                "bare forward pass",
                n,
                "images",
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
