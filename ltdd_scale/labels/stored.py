"""Labels "stored": the teacher's logits on every view of every epoch, made once, as fp16.

Views are drawn from the labels' own seed: every student sees those that were labelled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltdd_scale.data import distilled
from ltdd_scale.errors import UserError
from ltdd_scale.labels.adjust import shift_of, shifted, tau_of
from ltdd_scale.labels.contract import Maker, label_key
from ltdd_scale.labels.mixture import with_class
from ltdd_scale.labels.views import EpochViews, draw_epoch, mix, onehot, render
from ltdd_scale.runtime.ranks import Ranks

Packed = dict[str, np.ndarray]  # of one epoch, see `pack`
PARTS = ("values", "classes")  # the second with top-k only
HELD = 2**28  # bytes of labels that a student makes once and keeps


class Stored:
    """See `contract.Labels`. `table` holds the packed epochs, drawn with `seed`, used in turn."""

    kind = "stored"

    def __init__(self, maker: Maker, table: Sequence[Packed], seed: int | str):
        self.onehot = onehot(maker.images.labels, maker.num_classes, maker.ranks.device)
        self.table, self.seed, self.num_classes = table, seed, maker.num_classes

    def view_key(self, student_seed: int | str, epoch: int) -> tuple[int | str, int]:
        return self.seed, epoch % len(self.table)

    def targets(
        self, epoch: int, drawn: EpochViews, indices: np.ndarray, x: Tensor, ranks: Ranks
    ) -> tuple[Tensor, Tensor]:
        packed = self.table[epoch % len(self.table)]
        logits = unpack(packed, indices, self.num_classes, x.device)
        return mix(self.onehot, drawn, indices), logits


def make(maker: Maker, folder: Path, context: Any) -> dict[str, Any]:
    """Write ``epoch-00000-values.npy`` (fp16) and, with top-k, ``-classes.npy`` (int16).

    Epochs are the unit of work, and batches have a fixed composition: the bytes do not depend on
    the number of ranks.
    """
    tau = tau_of(maker)
    shift = shift_of(tau, maker.train_counts, maker.ranks.device)
    epochs = _num_epochs(maker)
    mine = context.mine(range(epochs))
    progress = context.progress("relabel", len(mine), "epochs")
    for k, epoch in enumerate(mine):
        if not _file(folder, epoch, "values").exists():
            packed = store_epoch(maker, epoch, shift)
            for part in sorted(packed):  # classes first: the values say that the epoch is done
                distilled.save(_file(folder, epoch, part), packed[part])
        progress.update(k + 1)
    return {"epochs": epochs, "tau": tau, "class_share": maker.relabel.class_share}


def load(folder: Path, facts: dict[str, Any], maker: Maker) -> Stored:
    """The epochs of a folder, each memory-mapped while the student is at it: all at once would need
    more open files than a process may have. Raises `UserError` where one is missing."""
    epochs, there = facts["epochs"], {path.name for path in folder.iterdir()}
    topk = any(_file(folder, epoch, "classes").name in there for epoch in range(epochs))
    parts = PARTS if topk else PARTS[:1]
    for path in (_file(folder, epoch, part) for epoch in range(epochs) for part in parts):
        if path.name not in there:
            raise UserError(f"{path}: missing; delete {folder} and make the labels again")

    def opened(epoch: int) -> Packed:
        return {part: np.load(_file(folder, epoch, part), mmap_mode="r") for part in parts}

    return Stored(maker, MadeWhenAsked(epochs, opened), facts["seed"])


def fresh(maker: Maker) -> Stored:
    """Labels of a set that has none on the disk: each epoch made when the student comes to it."""
    shift = shift_of(tau_of(maker), maker.train_counts, maker.ranks.device)

    def packed(epoch: int) -> Packed:
        return store_epoch(maker, epoch, shift)

    made = MadeWhenAsked(_num_epochs(maker), packed, keeps=HELD)
    return Stored(maker, made, label_key(maker.seed))


def store_epoch(maker: Maker, epoch: int, shift: Tensor | None) -> Packed:
    """The packed teacher logits of one epoch's views of every image, adjusted and with the class's
    share, which is that of the view."""
    images, size = maker.images, maker.relabel.batch_size
    key, cutmix = label_key(maker.seed), maker.views.cutmix
    drawn = draw_epoch(maker.spec, images.sizes, key, epoch, cutmix)
    order = np.arange(len(images.labels))
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    shown = render(images, drawn, batches, maker.spec, maker.normalize)
    logits = shifted(torch.cat([maker.teach(x) for x in shown]), shift)
    share = maker.relabel.class_share
    if share:
        classes = mix(onehot(images.labels, maker.num_classes, logits.device), drawn, order)
        logits = with_class(logits, classes, share)
    return pack(logits, maker.relabel.topk, maker.temperature)


def pack(logits: Tensor, topk: int, temperature: float | None = None) -> Packed:
    """Logits [n, C] as fp16 "values". With 0 < topk < C: the k largest, their "classes" int16, and
    in the last column of the values what each of the rest is taken for.

    For students that learn by KL at `temperature` T that is the logit with which the rest keeps its
    share of the softmax(z / T); their mean would halve it. For a squared error, None, the mean.
    """
    if not topk or topk >= logits.shape[1]:
        return {"values": logits.half().cpu().numpy()}
    values, classes = logits.topk(topk, 1)
    others = logits.shape[1] - topk
    if temperature is None:
        rest = (logits.sum(1) - values.sum(1)) / others
    else:
        left = (logits / temperature).scatter(1, classes, -torch.inf)
        rest = temperature * (left.logsumexp(1) - math.log(others))
    return {
        "values": torch.cat([values, rest[:, None]], 1).half().cpu().numpy(),
        "classes": classes.to(torch.int16).cpu().numpy(),
    }


def unpack(packed: Packed, rows: np.ndarray, num_classes: int, device: torch.device) -> Tensor:
    """Logits float32 [len(rows), C] from `pack`, the rest filled with one value."""
    values = torch.from_numpy(packed["values"][rows]).to(device, non_blocking=True).float()
    if "classes" not in packed:
        return values
    out = values[:, -1:].expand(-1, num_classes).clone()
    classes = torch.from_numpy(packed["classes"][rows].astype(np.int64))
    return out.scatter_(1, classes.to(device, non_blocking=True), values[:, :-1])


class MadeWhenAsked(Sequence):
    """Packed epochs, each made or opened when it is asked for. The last one is kept, and all where
    they take at most `keeps` bytes: they are used in turn."""

    def __init__(self, num_epochs: int, make: Callable[[int], Packed], keeps: int = 0):
        self._num_epochs, self._make, self._keeps = num_epochs, make, keeps
        self._kept: dict[int, Packed] = {}

    def __len__(self) -> int:
        return self._num_epochs

    def __getitem__(self, epoch):
        if epoch not in self._kept:
            packed = self._make(epoch)
            if self._num_epochs * sum(part.nbytes for part in packed.values()) > self._keeps:
                self._kept.clear()
            self._kept[epoch] = packed
        return self._kept[epoch]


def _num_epochs(maker: Maker) -> int:
    return maker.relabel.epochs or maker.epochs


def _file(folder: Path, epoch: int, part: str) -> Path:
    return folder / f"epoch-{epoch:05d}-{part}.npy"
