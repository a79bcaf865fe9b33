"""How often an expert is right."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ltdd_scale.data import sampling
from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.loader import Normalize, stream_images
from ltdd_scale.data.settings import Seen
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.models import frozen
from ltdd_scale.runtime import signals
from ltdd_scale.runtime.context import Context


@torch.no_grad()
def hits(
    model: nn.Module,
    split: ShardSplit,
    seen: Seen,
    normalize: Normalize,
    context: Context,
    batch: int = 256,
) -> np.ndarray:
    """Images and right predictions of each class of a split, int64 [2, C]; every image once, shared
    over ranks."""
    ranks = context.ranks
    mine = np.arange(len(split))[sampling.rank_slice(len(split), ranks.rank, ranks.world_size)]
    # One pass: each rank decodes its own part only.
    images = stream_images(split, seen, ranks.device, context.workers)
    plans = [(mine[i : i + batch], None) for i in range(0, len(mine), batch)]
    found = np.zeros((2, len(split.classes)), np.int64)
    shown = images.stream(plans, ViewSpec(seen.resolution))
    for (indices, _), x in zip(plans, shown, strict=True):
        signals.check()
        predicted = frozen.forward(model, normalize(x), ranks).argmax(1).cpu().numpy()
        labels = split.labels[indices]
        np.add.at(found[0], labels, 1)
        np.add.at(found[1], labels[predicted == labels], 1)
    return np.sum(ranks.gather(found), axis=0)


def judge(
    role: str,
    model: nn.Module,
    split: ShardSplit,
    seen: Seen,
    normalize: Normalize,
    context: Context,
) -> dict[str, float]:
    """Accuracy on the validation images, where the set of `split` has some, in per cent: of all,
    and the mean and the spread over classes."""
    if "val" not in split.manifest["splits"]:
        return {}
    held = ShardSplit(context.input("shard"), "val")
    images, right = hits(model, held, seen, normalize, context)
    each = 100 * right[images > 0] / images[images > 0]
    found = {
        "val_top1": 100 * right.sum() / images.sum(),
        "val_balanced": each.mean(),
        "val_class_std": each.std(),
    }
    found = {name: round(float(value), 2) for name, value in found.items()}
    context.say(
        f"{role}: {found['val_balanced']:.1f} % of the validation images, "
        f"spread over classes {found['val_class_std']:.1f}"
    )
    return found
