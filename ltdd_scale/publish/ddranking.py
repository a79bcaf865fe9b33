"""A set as the package `ddranking` reads it (arXiv 2505.13300): tensors, class after class."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ltdd_scale.errors import UserError
from ltdd_scale.publish.card import what_images_are, words
from ltdd_scale.publish.encode import decode
from ltdd_scale.publish.opened import Opened
from ltdd_scale.runtime import files

# What the package normalises its own test images with, for the sets that it knows by name.
_CIFAR = ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])
_IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
DATASETS = {
    "CIFAR10": (10, *_CIFAR),
    "CIFAR100": (100, *_CIFAR),
    "TinyImageNet": (200, *_IMAGENET),
    "ImageNet1K": (1000, *_IMAGENET),
}
IMAGES, LABELS = "images.pt", "labels.pt"
README = """# {name}, for `ddranking`
{are}
`images.pt`: float32 [{n}, 3, {size}, {size}], class after class, {ipc} of each, normalised with
{of}.
{labels}

Licence of the source images: {license}.

```python
import torch
from ddranking.metrics import {metric}

images = torch.load("images.pt")
{load}metric = {metric}(
    dataset="{dataset}", real_data_path=..., ipc={ipc}, model_name=...,
    im_size=({size}, {size}),{soft}
)
{mend}metric.compute_metrics(image_tensor=images{given})
```

Classes, in label order, have to be those of the package's data set: {classes}.

The score that the package prints (version 0.2.0) has per cent in its exponential. It draws random
images from the balanced set that it knows, tries five learning rates, and keeps the best epoch on
the test images. The score in the set's own card has fractions, random images of the long-tailed
set, and last weights: the two are not comparable.
"""


def write(opened: Opened, folder: Path, dataset: str | None, license: str | None = None) -> None:
    """Write ``images.pt``, ``labels.pt`` where the set has soft labels, and how to load them.

    `dataset` is the package's name of the data set: images are normalised as it normalises its own.
    None: as our students see them. `license` takes the place of the set's own. Raises `UserError`
    where classes differ in their images, which the package does not know, or in number from those
    of `dataset`, for whitened images, and where the disk is full.
    """
    counts, told = opened.image_counts, opened.told
    if len(set(counts)) > 1:
        raise UserError(
            f"{opened.folder}: classes have {min(counts)} to {max(counts)} images, and ddranking "
            "takes sets with equally many"
        )
    if told.get("zca"):
        raise UserError(
            f"{opened.folder}: networks see whitened images of this set, and the tensors of "
            "ddranking are normalised by channel: distill one with data.zca=false"
        )
    mean, std = told["mean"], told["std"]
    if dataset:
        expected, mean, std = DATASETS[dataset]
        if expected != len(counts):
            raise UserError(f"--dataset {dataset} has {expected} classes, the set {len(counts)}")
    folder.mkdir(parents=True, exist_ok=True)
    _images(opened, folder / IMAGES, mean, std)
    if opened.soft is not None:
        _save(torch.from_numpy(np.array(opened.soft, np.float32)), folder / LABELS)
    files.write_text(folder / "README.md", _readme(opened, dataset, license))


def _images(opened: Opened, path: Path, mean: list[float], std: list[float]) -> None:
    """Through a file that is mapped: the tensor of a large set does not fit into memory."""
    side, n = opened.told["resolution"], sum(opened.image_counts)
    mapped = path.with_suffix(".tmp")
    try:
        held = np.lib.format.open_memmap(mapped, "w+", np.float32, (n, 3, side, side))
        with open(mapped, "r+b") as file:  # a full disk is an error here, and a signal later on
            os.posix_fallocate(file.fileno(), 0, mapped.stat().st_size)
        at, scale = (np.asarray(v, np.float32)[:, None, None] for v in (mean, std))
        for row, sample in enumerate(opened.samples()):
            held[row] = (decode(sample.content, sample.name).astype(np.float32) / 255 - at) / scale
        _save(torch.from_numpy(held), path)
    finally:
        mapped.unlink(missing_ok=True)


def _save(tensor: torch.Tensor, path: Path) -> None:
    """As `torch.save`, which has an error of its own for a disk that is full."""
    try:
        torch.save(tensor, path)
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be written ({said}); is the disk full?") from None


def _readme(opened: Opened, dataset: str | None, license: str | None) -> str:
    told, soft = opened.told, opened.soft is not None
    if license is None:
        license = ", ".join(filter(None, (opened.publish.license, opened.publish.license_link)))
    values: dict[str, Any] = {
        "name": words(told["name"]),
        "are": f"\n{are}\n" if (are := what_images_are(opened)) else "",
        "license": words(license) or "not stated. Whoever gives this away has to say it",
        "n": sum(opened.image_counts),
        "size": told["resolution"],
        "ipc": opened.image_counts[0],
        "classes": ", ".join(map(words, opened.names[:20]))
        + (", …" if len(opened.names) > 20 else ""),
        "dataset": dataset or "...",
        "of": f"the mean and std that the package has for {dataset}"
        if dataset
        else "the set's own mean and std (`--dataset NAME` takes the package's)",
        "metric": "LabelRobustScoreSoft" if soft else "LabelRobustScoreHard",
        "labels": "`labels.pt`: float32 "
        f"[{sum(opened.image_counts)}, {opened.num_classes}], a row of logits for each image: the "
        "package takes their softmax."
        if soft
        else "There are no soft labels: the package makes the classes itself.",
        "load": 'labels = torch.load("labels.pt")\n' if soft else "",
        "soft": '\n    soft_label_mode="S", soft_label_criterion="sce",'
        "\n    teacher_dir=..., teacher_model_names=[...],"
        if soft
        else "",
        # Read in its metrics/soft_label.py: one name is set, the other one asked for.
        "mend": "metric.teacher_model = metric.teacher_models[0]  # 0.2.0 forgets to set it\n"
        if soft
        else "",
        "given": ", soft_labels=labels" if soft else "",
    }
    return README.format(**values)
