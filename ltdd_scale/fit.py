"""Training on a distilled set alone: what a user of the set does, without our configs, shards or store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ltdd_scale import config as configuration
from ltdd_scale import evaluate, softlabels
from ltdd_scale.data.loader import MemoryImages, normalizer
from ltdd_scale.data.shards import square
from ltdd_scale.data.sources import IMAGE_NAMES
from ltdd_scale.errors import UserError
from ltdd_scale.models import registry
from ltdd_scale.runtime import files, ranks, tensors
from ltdd_scale.runtime.context import Context


def read_images(folder: Path, names: list[str], resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """Images under folder/<name>/ as uint8 [N, 3, R, R], with labels int64 [N]. Raises `UserError` for an empty class."""
    pixels, labels = [], []
    for c, name in enumerate(names):
        found = sorted(p for p in (folder / name).glob("*") if p.suffix.lower() in IMAGE_NAMES)
        if not found:
            raise UserError(f"{folder / name}: no images of class {c} there")
        for path in found:
            with Image.open(path) as image:
                pixels.append(
                    np.asarray(square(image.convert("RGB"), resolution)).transpose(2, 0, 1)
                )
            labels.append(c)
    return np.stack(pixels), np.asarray(labels, np.int64)


def read_labels(
    folder: Path,
    classes: np.ndarray,
    num_classes: int,
    train_counts: list[int],
    device: torch.device,
) -> softlabels.Labels:
    """The labels that came with the set."""
    facts = files.read_json(folder / "labels.json")
    table: Any = None
    if facts["labels"] == "single":
        table = torch.from_numpy(np.load(folder / "single.npy")).to(device)
    elif facts["labels"] == "stored":
        table = softlabels.load_stored(folder, facts["epochs"])
    shift = (
        softlabels.shift_of(facts["tau"], np.asarray(train_counts), device)
        if facts["tau"]
        else None
    )
    return softlabels.Labels(
        facts["labels"], classes, num_classes, device, facts["seed"], table, shift
    )


def run(
    distilled: Path,
    net: str | None,
    epochs: int | None,
    seed: int,
    test: Path | None,
    save: Path | None,
) -> int:
    """Train `net` on the distilled set as it was judged; print its accuracy on `test`, write its weights to `save`."""
    if not (distilled / "set.json").exists():
        raise UserError(f"{distilled} is not a distilled set (no set.json in it)")
    if epochs is not None and epochs < 1:
        raise UserError(f"--epochs {epochs}: at least 1")
    description = files.read_json(distilled / "set.json")
    config = configuration.from_dict(description["config"])
    peers = ranks.join("auto", config.runtime.precision, len(os.sched_getaffinity(0)))
    size, settings = description["resolution"], config.evaluate
    pixels, classes = read_images(distilled / "images", description["folders"], size)
    images = MemoryImages(pixels, classes, peers.device)
    saved = tensors.load(distilled / "teacher.pt")
    teacher = peers.to_device(registry.Network.build(saved["recipe"], saved["model"]))
    normalize = normalizer(description["mean"], description["std"], peers.device)
    num_classes = len(description["classes"])
    labels = read_labels(
        distilled / "labels", classes, num_classes, description["train_counts"], peers.device
    )
    spec = softlabels.view_spec(settings, size, config.data.mirror)
    net = net or (settings.nets or [config.teacher.net])[0]
    key, expert = f"student {seed}", config.teacher
    student = registry.seeded(
        lambda: registry.Student(
            registry.backbone(net, expert.width, expert.norm, size), num_classes
        ),
        key,
        "weights",
    )
    # No checkpoints: nothing is written but what was asked for.
    context = Context(peers, distilled / ".none", {}, "fit", float("inf"))
    model, _ = evaluate.train_student(
        peers.to_device(student),
        images,
        labels,
        teacher,
        normalize,
        spec,
        settings,
        epochs or settings.epochs,
        key,
        context,
        f"{net} seed {seed}",
    )
    if save:
        tensors.save(
            save,
            {
                "recipe": {
                    **registry.Network.describe(net, expert.width, expert.norm, size, num_classes)
                },
                "model": model.state_dict(),
            },
        )
        print(f"weights  {save}")
    if test:
        named = [
            c if (test / c).is_dir() else f
            for c, f in zip(description["classes"], description["folders"], strict=True)
        ]
        held, truth = read_images(test, named, size)
        result = evaluate.metrics(
            evaluate.predict(model, MemoryImages(held, truth, peers.device), normalize, peers),
            truth,
            ["many"] * num_classes,
        )
        print(
            f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, spread over classes {result['class_std']:.2f}, {len(truth)} images"
        )
    elif not save:
        print("trained, but neither --test nor --save was given: nothing to show")
    return 0
