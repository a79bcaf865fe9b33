"""Stage "initialize": confidence-guided multi-round initialisation (RLDD §Initialisation).

K crops of every real image are scored by the teacher's −CE. Round after round every image of the class gives its best unused crop,
best first, until IPC are taken. Classes too small for that (41 of ImageNet-LT's have fewer than 10 images) draw further crops with new
seeds, and the record says so.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ltdd_scale.config import Config
from ltdd_scale.data import arrays, sampling
from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.loader import normalizer, open_images
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.models import registry
from ltdd_scale.runtime import files, tensors
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import rng


def select(scores: np.ndarray, ipc: int) -> tuple[np.ndarray, np.ndarray]:
    """Multi-round selection from scores [images, crops]: (image, crop) of each choice, at most `ipc`, in order of choice.

    In round r every image offers its r-th best crop; offers are taken best first. Ties go to the lower index.
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


def _draws(
    spec: ViewSpec, images, members: np.ndarray, crops: int, seed: int, label: int, attempt: int
):
    """`crops` views of each member, keyed by (seed, class, attempt): all of one image together."""
    return spec.draw(
        rng(seed, "initial crops", label, attempt), np.repeat(images.sizes[members], crops, 0)
    )


@torch.no_grad()
def _confident(
    label: int,
    members: np.ndarray,
    images,
    teacher,
    normalize,
    spec: ViewSpec,
    config: Config,
    ranks,
) -> tuple[np.ndarray, list[dict]]:
    """IPC crops of one class, uint8 [IPC, 3, R, R], and where they come from."""
    settings, ipc = config.initialize, config.ipc
    chosen: list[np.ndarray] = []
    provenance: list[dict] = []
    attempt = 0
    while len(chosen) < ipc:  # each attempt adds min(ipc, images × crops) ≥ 1: it ends
        views = _draws(spec, images, members, settings.crops, config.seed, label, attempt)
        repeated = np.repeat(members, settings.crops)
        plans = [
            (repeated[i : i + settings.batch_size], views[i : i + settings.batch_size])
            for i in range(0, len(repeated), settings.batch_size)
        ]
        scores = []
        for (indices, _), x in zip(plans, images.stream(plans, spec), strict=True):
            with ranks.autocast():
                logits = teacher(normalize(x)).float()
            target = torch.full((len(indices),), label, device=logits.device)
            scores.append(-F.cross_entropy(logits, target, reduction="none").cpu().numpy())
        table = np.concatenate(scores).reshape(len(members), settings.crops)
        image, crop = select(table, ipc - len(chosen))
        flat = image * settings.crops + crop
        # Only the chosen crops are made again: holding all would need memory for images × K of the head class.
        for x in images.stream([(repeated[flat], views[flat])], spec):
            chosen += list(arrays.to_uint8(x))
        seen: dict[int, int] = {}
        for i, k in zip(image, flat, strict=True):
            seen[int(i)] = seen.get(int(i), -1) + 1
            provenance.append(
                {
                    "image": int(members[i]),
                    "window": [round(float(v), 6) for v in views.windows[k]],
                    "mirrored": bool(views.mirrored[k]),
                    "score": round(float(table.flat[k]), 6),
                    "round": seen[int(i)],
                    "attempt": attempt,
                }
            )
        attempt += 1
    return np.stack(chosen), provenance


def _random(
    label: int, members: np.ndarray, images, spec: ViewSpec, config: Config
) -> tuple[np.ndarray, list[dict]]:
    """IPC random crops of random images, every image once before any a second time."""
    generator = rng(config.seed, "random init", label)
    passes = -(-config.ipc // len(members))
    picked = np.concatenate([generator.permutation(members) for _ in range(passes)])[: config.ipc]
    views = spec.draw(generator, images.sizes[picked])
    x = next(iter(images.stream([(picked, views)], spec)))
    rows = [
        {"image": int(i), "window": [round(float(v), 6) for v in w], "mirrored": bool(m)}
        for i, w, m in zip(picked, views.windows, views.mirrored, strict=True)
    ]
    return arrays.to_uint8(x), rows


def run(config: Config, context: Context) -> dict[str, Any]:
    """Write ``00000.npy`` (uint8 [IPC, 3, R, R]) and ``00000.json`` (provenance) for each class.

    A class is the unit of work: its crops, scores and batches do not depend on which rank does it.
    """
    ranks, split = context.ranks, ShardSplit(context.input("shard"), "train")
    size = config.data.resolution
    images = open_images(split, config, ranks.device)
    normalize = normalizer(split.mean, split.std, ranks.device)
    spec = ViewSpec(size, tuple(config.initialize.crop_scale), mirror=config.data.mirror)
    saved = tensors.load(context.input("teacher") / "weights.pt")
    teacher = ranks.to_device(registry.Network.build(saved["recipe"], saved["model"]))
    mine = sampling.spread(split.counts, ranks.world)[ranks.rank]
    names = split.names
    progress = context.progress("initialize", len(mine), "classes")
    for k, label in enumerate(mine):
        table = context.out / f"{label:05d}.json"
        if (
            not table.exists()
        ):  # written after the images: both are there, or the class is done again
            members = np.flatnonzero(split.labels == label)
            if config.strategies.confident_init:
                pixels, provenance = _confident(
                    label, members, images, teacher, normalize, spec, config, ranks
                )
            else:
                pixels, provenance = _random(label, members, images, spec, config)
            for row in provenance:
                row["source"] = names[row["image"]]
            arrays.save(arrays.class_file(context.out, label), pixels)
            files.write_json(table, provenance)
        progress.update(k + 1)
    ranks.barrier()
    attempts = [
        max(
            (row.get("attempt", 0) for row in files.read_json(context.out / f"{c:05d}.json")),
            default=0,
        )
        for c in range(len(split.classes))
    ]
    return {"classes needing further crops": sum(a > 0 for a in attempts)}
