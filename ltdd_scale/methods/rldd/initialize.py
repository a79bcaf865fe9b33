"""Stage "initialize": confidence-guided multi-round initialisation (RLDD §Initialisation).

K crops of every real image are scored by the teacher's −CE. Round after round every image of the
class gives its best unused crop, best first, until IPC are taken. Classes too small for that (41 of
ImageNet-LT's have fewer than 10 images) draw further crops with new seeds, and the record says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ltdd_scale.data import chosen, distilled, sampling
from ltdd_scale.data.augment import Views, ViewSpec
from ltdd_scale.data.images import Images
from ltdd_scale.data.loader import Normalize, open_images, prepare
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.methods.rldd.settings import Initialize
from ltdd_scale.models import frozen
from ltdd_scale.runtime import files
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import rng
from ltdd_scale.stage import Given

Rows = list[dict[str, Any]]  # provenance: a row an image


@dataclass(frozen=True)
class Crops:
    """What crops are drawn from and judged by: the real images, the teacher (if crops are chosen by
    confidence), and the settings that both ways share."""

    images: Images
    teacher: frozen.Frozen | None
    normalize: Normalize
    spec: ViewSpec
    settings: Initialize
    ipc: int
    seed: int


def select(scores: np.ndarray, ipc: int) -> tuple[np.ndarray, np.ndarray]:
    """Multi-round selection from scores [images, crops]: (image, crop) of each choice, at most
    `ipc`, in order of choice.

    In round r every image offers its r-th best crop; offers are taken best first. Ties go to the
    lower index.
    """
    ranked = np.argsort(-scores, axis=1, kind="stable")
    images, crops = [], []
    for r in range(scores.shape[1]):
        offered = scores[np.arange(len(scores)), ranked[:, r]]
        for i in np.argsort(-offered, kind="stable"):
            if len(images) == ipc:
                return np.asarray(images), np.asarray(crops)
            images.append(int(i))
            crops.append(int(ranked[i, r]))
    return np.asarray(images, int), np.asarray(crops, int)


def score(crops: Crops, label: int, indices: np.ndarray, views: Views) -> np.ndarray:
    """−CE of the teacher with class `label` for each view of the images `indices`, float32 [n]."""
    batch, teacher = crops.settings.batch_size, crops.teacher
    assert teacher is not None, "confidence is the teacher's"
    starts = range(0, len(indices), batch)
    plans = [(indices[i : i + batch], views[i : i + batch]) for i in starts]
    scores = []
    for x in crops.images.stream(plans, crops.spec):
        logits = teacher.logits(crops.normalize(x))
        target = torch.full((len(x),), label, device=logits.device)
        scores.append(-F.cross_entropy(logits, target, reduction="none"))
    return torch.cat(scores).cpu().numpy()


def confident(crops: Crops, label: int, members: np.ndarray) -> tuple[np.ndarray, Rows]:
    """IPC crops of one class, uint8 [IPC, 3, R, R], and where they come from. `members`: the
    class's images."""
    k, ipc = crops.settings.crops, crops.ipc
    taken: list[np.ndarray] = []
    rows: Rows = []
    attempt = 0
    while len(taken) < ipc:  # each attempt adds min(ipc, images × crops) ≥ 1: it ends
        # All crops of one image together, keyed by (seed, class, attempt).
        repeated = np.repeat(members, k)
        generator = rng(crops.seed, "initial crops", label, attempt)
        views = crops.spec.draw(generator, np.repeat(crops.images.sizes[members], k, 0))
        table = score(crops, label, repeated, views).reshape(len(members), k)
        image, crop = select(table, ipc - len(taken))
        flat = image * k + crop
        # Only the chosen crops are made again: holding all would need memory for images × K of the
        # head class.
        for x in crops.images.stream([(repeated[flat], views[flat])], crops.spec):
            taken += list(distilled.to_uint8(x))
        rounds: dict[int, int] = {}
        made = _rows(members[image], views[flat])
        for i, value, row in zip(image, table.flat[flat], made, strict=True):
            rounds[int(i)] = rounds.get(int(i), -1) + 1
            row["score"] = round(float(value), 6)
            row["round"], row["attempt"] = rounds[int(i)], attempt
        rows += made
        attempt += 1
    return np.stack(taken), rows


def random(crops: Crops, label: int, members: np.ndarray) -> tuple[np.ndarray, Rows]:
    """IPC random crops of random images, every image once before any a second time."""
    generator = rng(crops.seed, "random init", label)
    picked = chosen.repeated(members, generator, crops.ipc)
    views = crops.spec.draw(generator, crops.images.sizes[picked])
    x = next(iter(crops.images.stream([(picked, views)], crops.spec)))
    return distilled.to_uint8(x), _rows(picked, views)


def _rows(indices: np.ndarray, views: Views) -> Rows:
    """Image and view of each crop: enough to make it again."""
    return [
        {"image": int(i), "window": [round(float(v), 6) for v in w], "mirrored": bool(m)}
        for i, w, m in zip(indices, views.windows, views.mirrored, strict=True)
    ]


def run(settings: Given, context: Context) -> dict[str, Any]:
    """Write a distilled set of real crops, with their provenance.

    A class is the unit of work: its crops, scores and batches do not depend on which rank does it.
    """
    ranks, split = context.ranks, ShardSplit(context.input("shard"), "train")
    initialize, seen = settings.initialize, settings.images
    teacher = None
    if initialize.confident:
        teacher = frozen.load(context.input("teacher") / "weights.pt", ranks)
    crops = Crops(
        open_images(split, seen, ranks.device, context.workers),
        teacher,
        prepare(split, ranks.device),
        ViewSpec(seen.resolution, tuple(initialize.crop_scale), mirror=seen.mirror),
        initialize,
        settings.ipc,
        settings.seed,
    )
    choose = random if teacher is None else confident
    mine = sampling.spread(split.counts, ranks.world_size)[ranks.rank]
    names = split.names
    progress = context.progress("initialize", len(mine), "classes")
    for k, label in enumerate(mine):
        # Written after the images: both are there, or the class is done again.
        if not distilled.provenance_file(context.out, label).exists():
            pixels, rows = choose(crops, label, np.flatnonzero(split.labels == label))
            for row in rows:
                row["source"] = names[row["image"]]
            distilled.write_class(context.out, label, pixels, rows)
        progress.update(k + 1)
    ranks.barrier()
    return {"classes needing further crops": _further(context, len(split.classes))}


def _further(context: Context, num_classes: int) -> int:
    """Classes for which one draw of crops was not enough."""
    tables = (distilled.provenance_file(context.out, c) for c in range(num_classes))
    return sum(any(row.get("attempt", 0) for row in files.read_json(t)) for t in tables)
