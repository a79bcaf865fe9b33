"""How many GPU-hours a run should take: images times FLOPs over what a GPU is assumed to reach. An order of magnitude, not a promise."""

from __future__ import annotations

from pathlib import Path

import torch

from ltdd_scale import graph
from ltdd_scale.config import Config
from ltdd_scale.errors import UserError
from ltdd_scale.models import registry
from ltdd_scale.runtime import files

BACKWARD = (
    2  # a backward pass costs about two forward passes; the gradient of the input alone about one
)


def forward_flops(net: str, width: int, norm: str, size: int) -> float:
    """FLOPs of one image's forward pass: twice the multiplications of convolutions and linear layers."""
    total = 0.0

    def count(layer: torch.nn.Module, _, out: torch.Tensor) -> None:
        nonlocal total
        per_output = layer.weight[0].numel()
        total += 2 * per_output * out.numel()

    with torch.device("meta"):
        model = registry.backbone(net, width, norm, size).eval()
        for layer in model.modules():
            if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
                layer.register_forward_hook(count)
        model(torch.empty(1, 3, size, size))
    return total


def class_counts(config: Config, store: Path) -> list[int] | None:
    """Images a class: from the shards where they are written, else from the source; None where neither can be read."""
    manifest = graph.graph(config)["shard"].folder(store) / "manifest.json"
    if manifest.exists():
        return files.read_json(manifest)["splits"]["train"]["counts"]
    from ltdd_scale.data import sources

    try:
        return sources.class_counts(config.data)
    except UserError:
        return None


def flops(config: Config, store: Path) -> dict[str, float] | None:
    """FLOPs of each job of a run; None where the set is not known yet."""
    counts = class_counts(config, store)
    if counts is None:
        return None
    size, images, small = config.data.resolution, sum(counts), len(counts) * config.ipc
    observer = forward_flops(config.observer.net, config.observer.width, config.observer.norm, size)
    teacher = forward_flops(config.teacher.net, config.teacher.width, config.teacher.norm, size)
    views = 2 if config.strategies.debias else 1
    out = {"shard": 0.0}
    for role, one in (("observer", observer), ("teacher", teacher)):
        out[role] = getattr(config, role).epochs * images * views * one * (1 + BACKWARD)
    with torch.device("meta"):
        layers = len(
            registry.norm_layers(
                registry.backbone(
                    config.observer.net, config.observer.width, config.observer.norm, size
                )
            )
        )
    passes = (
        (layers + 1) / 2 if config.calibrate.recalibrate else 1
    )  # one a layer, up to that layer
    out["calibrate"] = passes * images * observer if config.strategies.calibrate else 0.0
    out["initialize"] = images * config.initialize.crops * teacher
    out["recover"] = (
        config.recover.iterations
        * small
        * 2
        * (observer + teacher * (config.recover.teacher_ce > 0))
    )
    settings, out["relabel"], out["students"] = config.relabel, 0.0, 0.0
    if settings.labels != "online":
        out["relabel"] = (
            small
            * teacher
            * ((settings.epochs or config.evaluate.epochs) if settings.labels == "stored" else 1)
        )
    for unit in graph.units(config):
        student = forward_flops(unit["net"], config.teacher.width, config.teacher.norm, size)
        epochs, many = (
            (config.evaluate.full_epochs, images)
            if unit["set"] == "full"
            else (config.evaluate.epochs, small)
        )
        out["students"] += (
            epochs
            * many
            * (student * (1 + BACKWARD) + (teacher if unit["labels"] == "online" else 0))
        )
    return out
