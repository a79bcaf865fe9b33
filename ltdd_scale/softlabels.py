"""Soft labels: views that can be drawn again from a seed, the teacher's logits on them, and their compact storage.

The views of an epoch belong to (seed, epoch, image): partner, box, crop and operations are drawn for the whole set at once, so a stored label is
found by (epoch, image) alone, whatever the batch size of who uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltdd_scale.config import Evaluate
from ltdd_scale.data import augment
from ltdd_scale.data.augment import Views, ViewSpec
from ltdd_scale.runtime.ranks import rng


@dataclass
class EpochViews:
    """The augmentation of a whole set of n images in one epoch: each image's view, its CutMix partner [n], box [n, 4] and share [n]."""

    views: Views
    partners: np.ndarray
    boxes: np.ndarray
    stays: np.ndarray


def view_spec(settings: Evaluate, resolution: int, mirror: bool) -> ViewSpec:
    return ViewSpec(
        resolution, tuple(settings.crop_scale), 0, mirror, settings.randaugment, settings.magnitude
    )


def draw_epoch(
    spec: ViewSpec, sizes: np.ndarray, seed: int | str, epoch: int, cutmix: bool
) -> EpochViews:
    generator = rng(seed, "student views", epoch)
    views = spec.draw(generator, sizes)
    n = len(sizes)
    partners = generator.permutation(n)
    boxes, stays = augment.cutmix_boxes(generator, n, spec.resolution)
    if not cutmix:
        partners, boxes, stays = np.arange(n), np.zeros_like(boxes), np.ones_like(stays)
    return EpochViews(views, partners, boxes, stays)


def render(
    images, epoch: EpochViews, batches: list[np.ndarray], spec: ViewSpec, normalize
) -> Iterator[Tensor]:
    """Normalised augmented images [b, 3, R, R] of each batch of indices."""
    plans = []
    for indices in batches:
        partners = epoch.partners[indices]
        both = np.concatenate([indices, partners[epoch.stays[indices] < 1]])
        plans.append((both, epoch.views[both]))
    for indices, x in zip(batches, images.stream(plans, spec), strict=True):
        x = normalize(x)
        own = x[: len(indices)]
        chosen = np.flatnonzero(epoch.stays[indices] < 1)
        if len(chosen):
            own, mixed = own.clone(), torch.from_numpy(chosen).to(x.device)
            own[mixed] = augment.paste(own[mixed], x[len(indices) :], epoch.boxes[indices][chosen])
        yield own


@torch.no_grad()
def teacher_logits(teacher: nn.Module, x: Tensor, ranks) -> Tensor:
    if x.device.type == "cuda":
        x = x.contiguous(memory_format=torch.channels_last)
    with ranks.autocast():
        return teacher(x).float()


def pack(logits: Tensor, topk: int) -> dict[str, np.ndarray]:
    """Logits [n, C] as fp16. With 0 < topk < C: the k largest, their classes, and the mean of the rest in the last column."""
    if not topk or topk >= logits.shape[1]:
        return {"values": logits.half().cpu().numpy()}
    values, classes = logits.topk(topk, 1)
    rest = (logits.sum(1) - values.sum(1)) / (logits.shape[1] - topk)
    return {
        "values": torch.cat([values, rest[:, None]], 1).half().cpu().numpy(),
        "classes": classes.to(torch.int16).cpu().numpy(),
    }


def unpack(packed: dict[str, np.ndarray], rows: np.ndarray, num_classes: int, device) -> Tensor:
    """Logits float32 [len(rows), C] from `pack`, the rest filled with its mean."""
    values = torch.from_numpy(packed["values"][rows]).to(device).float()
    if "classes" not in packed:
        return values
    out = values[:, -1:].expand(-1, num_classes).clone()
    return out.scatter_(
        1, torch.from_numpy(packed["classes"][rows].astype(np.int64)).to(device), values[:, :-1]
    )


class Labels:
    """Targets of a set of images for one kind of label.

    `kind`: online, stored, single or hard. `table`: for stored a list of packed epochs, drawn with `seed`; for single logits float32 [n, C].
    `shift` float32 [C] is subtracted from the teacher's logits (ADSA's τ·log π).
    """

    def __init__(
        self,
        kind: str,
        classes: np.ndarray,
        num_classes: int,
        device,
        seed: int | str = 0,
        table: Any = None,
        shift: Tensor | None = None,
    ):
        self.kind, self.num_classes, self.seed, self.table, self.shift = (
            kind,
            num_classes,
            seed,
            table,
            shift,
        )
        self.onehot = F.one_hot(torch.from_numpy(classes), num_classes).float().to(device)

    def view_key(self, student_seed: int | str, epoch: int) -> tuple[int | str, int]:
        """(seed, epoch) from which this epoch's views are drawn: stored labels belong to the views they were made on."""
        return (
            (self.seed, epoch % len(self.table)) if self.kind == "stored" else (student_seed, epoch)
        )

    def targets(
        self, epoch: int, drawn: EpochViews, indices: np.ndarray, x: Tensor, teacher, ranks
    ) -> tuple[Tensor, Tensor | None]:
        """(mixed classes [b, C], logits [b, C] or None for hard labels) of images `indices` shown as `x`."""
        stays = torch.from_numpy(drawn.stays[indices]).to(x.device)[:, None]
        partners = drawn.partners[indices]
        mix = lambda table: stays * table[indices] + (1 - stays) * table[partners]  # noqa: E731
        if self.kind == "hard":
            return mix(self.onehot), None
        if self.kind == "online":
            logits = teacher_logits(teacher, x, ranks)
            logits = logits if self.shift is None else logits - self.shift
        elif self.kind == "stored":
            logits = unpack(
                self.table[epoch % len(self.table)], indices, self.num_classes, x.device
            )
        else:
            logits = mix(self.table)
        return mix(self.onehot), logits


def store_epoch(
    images,
    teacher,
    normalize,
    spec: ViewSpec,
    seed,
    epoch: int,
    cutmix: bool,
    topk: int,
    batch_size: int,
    shift,
    ranks,
) -> dict[str, np.ndarray]:
    """The packed teacher logits of one epoch's views of every image."""
    drawn = draw_epoch(spec, images.sizes, seed, epoch, cutmix)
    order = np.arange(len(images.labels))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    found = [
        teacher_logits(teacher, x, ranks) for x in render(images, drawn, batches, spec, normalize)
    ]
    logits = torch.cat(found)
    return pack(logits if shift is None else logits - shift, topk)


def stored_file(folder: Path, epoch: int, part: str) -> Path:
    return folder / f"epoch-{epoch:05d}-{part}.npy"


class MadeWhenAsked:
    """Packed epochs of a set that has none on disk, each made when the student comes to it: the last one is kept."""

    def __init__(self, num_epochs: int, make: Callable[[int], dict[str, np.ndarray]]):
        self._num_epochs, self._make, self._last = num_epochs, make, (-1, {})

    def __len__(self) -> int:
        return self._num_epochs

    def __getitem__(self, epoch: int) -> dict[str, np.ndarray]:
        if self._last[0] != epoch:
            self._last = (epoch, self._make(epoch))
        return self._last[1]


def load_stored(folder: Path, epochs: int) -> list[dict[str, np.ndarray]]:
    """The packed epochs that relabel stored, memory-mapped."""
    found = [
        {part: stored_file(folder, e, part) for part in ("values", "classes")}
        for e in range(epochs)
    ]
    return [
        {part: np.load(path, mmap_mode="r") for part, path in parts.items() if path.exists()}
        for parts in found
    ]


def single_logits(
    images, teacher, normalize, spec: ViewSpec, batch_size: int, shift, ranks
) -> Tensor:
    """The teacher's logits on each whole, unaugmented image, float32 [n, C]."""
    order = np.arange(len(images.labels))
    plans = [(order[i : i + batch_size], None) for i in range(0, len(order), batch_size)]
    logits = torch.cat(
        [teacher_logits(teacher, normalize(x), ranks) for x in images.stream(plans, spec)]
    )
    return logits if shift is None else logits - shift


def adsa_tau(
    logits: Tensor, classes: np.ndarray, prior: np.ndarray, high: float = 2.0, steps: int = 81
) -> float:
    """τ of ADSA: p ∝ exp(f_y − τ·log π_y) with the smallest spread over classes of the mean confidence in the own class.

    `logits` float [n, C] on the distilled images of `classes` [n], `prior` the class frequencies [C] of the long-tailed set.
    """
    log_prior = torch.from_numpy(np.log(prior / prior.sum())).to(logits.device)
    own = torch.from_numpy(classes).to(logits.device)
    onehot = F.one_hot(own, logits.shape[1]).double()
    best = (float("inf"), 0.0)
    for tau in np.linspace(0, high, steps):
        p = F.softmax(logits.double() - tau * log_prior, 1).gather(1, own[:, None])
        spread = float(((onehot.T @ p)[:, 0] / onehot.sum(0)).std())
        best = min(best, (spread, float(tau)))
    return best[1]


def shift_of(tau: float, counts: np.ndarray, device) -> torch.Tensor:
    """τ·log π less its mean, float32 [C]: a softmax does not see the mean, students of raw logits would have to learn it."""
    shift = tau * np.log(counts / counts.sum())
    return torch.from_numpy(shift - shift.mean()).float().to(device)
