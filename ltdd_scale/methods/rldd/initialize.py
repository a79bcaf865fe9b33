"""Stage "initialize": crops of real images, from which the distilled ones start.

K crops of every real image are shown to the teacher, which chooses (`selection`): the most
confident ones (RLDD §Initialisation), or those that stand for the class in its feature space. Round
after round every image of the class gives one, until there are enough. Classes too small for that
(41 of ImageNet-LT's have fewer than 10 images) draw further crops with new seeds, and the record
says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ltdd_scale.data import augment, chosen, distilled, sampling
from ltdd_scale.data.augment import Views, ViewSpec
from ltdd_scale.data.images import Images, Plan
from ltdd_scale.data.loader import Normalize, open_images, prepare
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.methods.rldd import selection
from ltdd_scale.methods.rldd.settings import Initialize
from ltdd_scale.models import areas, frozen
from ltdd_scale.runtime import files
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import rng
from ltdd_scale.stage import Given

Rows = list[dict[str, Any]]  # provenance: a row a crop
BY_FEATURES = {"herding": selection.herding, "k_center": selection.k_center}


@dataclass(frozen=True)
class Crops:
    """What crops are drawn from and judged by: the real images, the teacher (if it is asked), and
    the settings that all ways share."""

    images: Images
    teacher: frozen.Frozen | None
    normalize: Normalize
    spec: ViewSpec
    settings: Initialize
    ipc: int
    seed: int

    @property
    def number(self) -> int:
        """Crops that the images of a class are made of."""
        return self.ipc * self.settings.mosaic**2

    def shown(self, indices: np.ndarray, views: Views) -> Iterator[Tensor]:
        """The views as the teacher sees them, a batch at a time."""
        batch = self.settings.batch_size
        starts = range(0, len(indices), batch)
        plans = [(indices[i : i + batch], views[i : i + batch]) for i in starts]
        for x in self.images.stream(plans, self.spec):
            yield self.normalize(x)


def score(crops: Crops, label: int, indices: np.ndarray, views: Views) -> np.ndarray:
    """−CE of the teacher with class `label` for each view of the images `indices`, float32 [n]."""
    return seen(crops, label, indices, views)[0].cpu().numpy()


def describe(
    crops: Crops, label: int, indices: np.ndarray, views: Views
) -> tuple[np.ndarray, np.ndarray]:
    """`score`, and the teacher's features of each view, float64 [n, d]."""
    scores, features = seen(crops, label, indices, views)
    return scores.cpu().numpy(), features.cpu().double().numpy()


def seen(crops: Crops, label: int, indices: np.ndarray, views: Views) -> tuple[Tensor, Tensor]:
    """What the teacher makes of each view, on its device: −CE with class `label`, float32 [n], and
    its features, float32 [n, d]."""
    teacher = crops.teacher
    assert teacher is not None, "the teacher judges"
    scores, features = [], []
    for x in crops.shown(indices, views):
        found, logits = teacher.features_and_logits(x)
        scores.append(_minus_ce(logits, label))
        features.append(found)
    return torch.cat(scores), torch.cat(features)


def _minus_ce(logits: Tensor, label: int) -> Tensor:
    target = torch.full((len(logits),), label, device=logits.device)
    return -F.cross_entropy(logits, target, reduction="none")


def judged(crops: Crops, label: int, members: np.ndarray) -> tuple[list[Plan], Rows]:
    """The crops of one class that the teacher chooses: what to draw, a plan an attempt, and where
    each crop comes from. `members`: the class's images."""
    own, k = crops.settings, crops.settings.draws(crops.spec.crop_scale or ())
    plans: list[Plan] = []
    rows: Rows = []
    taken: np.ndarray | None = None  # features of what earlier attempts have given
    while len(rows) < crops.number:  # each attempt adds min(wanted, images × K) ≥ 1: it ends
        # All crops of one image together, keyed by (seed, class, attempt).
        attempt, wanted = len(plans), crops.number - len(rows)
        generator = rng(crops.seed, "initial crops", label, attempt)
        repeated = np.repeat(members, k)
        views = crops.spec.draw(generator, crops.images.sizes[repeated])
        if own.by_features:
            scores, features = describe(crops, label, repeated, views)
            taken = features[:0] if taken is None else taken
            confidence = np.exp(scores.astype(np.float64)).reshape(-1, k)
            able = selection.pool(confidence, own.pool, wanted)
            choose = BY_FEATURES[own.select]
            found, rounds = choose(features[able], able // k, wanted, taken)
            found = able[found]
            taken = np.concatenate([taken, features[found]])
        else:
            scores = score(crops, label, repeated, views)
            found, rounds = selection.confident(scores.reshape(-1, k), wanted)
        plans.append((repeated[found], views[found]))
        made = _rows(repeated[found], views[found])
        for row, value, r in zip(made, scores[found], rounds, strict=True):
            row["score"] = round(float(value), 6)
            row["round"], row["attempt"] = int(r), attempt
        rows += made
    return plans, rows


def random(crops: Crops, label: int, members: np.ndarray) -> tuple[list[Plan], Rows]:
    """Random crops of random images, every image once before any a second time; as `judged`."""
    generator = rng(crops.seed, "random init", label)
    picked = chosen.repeated(members, generator, crops.number)
    views = crops.spec.draw(generator, crops.images.sizes[picked])
    return [(picked, views)], _rows(picked, views)


def _rows(indices: np.ndarray, views: Views) -> Rows:
    """Image and view of each crop: enough to make it again."""
    return [
        {"image": int(i), "window": [round(float(v), 6) for v in w], "mirrored": bool(m)}
        for i, w, m in zip(indices, views.windows, views.mirrored, strict=True)
    ]


def make(crops: Crops, plans: list[Plan]) -> np.ndarray:
    """The images of a class, uint8 [IPC, 3, R, R], made of the crops of `plans`.

    Only the chosen crops are made again: holding all would need memory for images × K of the head
    class.
    """
    side = crops.settings.mosaic
    parts = [
        distilled.to_uint8(x if side == 1 else shrink(x, side))
        for x in crops.images.stream(plans, crops.spec)
    ]
    return tile(np.concatenate(parts), side)


def shrink(x: Tensor, side: int) -> Tensor:
    """Images float [n, 3, R, R] → [n, 3, R / side, R / side]."""
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=x.device).expand(len(x), 4)
    plain = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    return augment.crop_resize(x, whole, plain, x.shape[-1] // side)


def tile(parts: np.ndarray, side: int) -> np.ndarray:
    """Parts [n · side², 3, r, r] → images [n, 3, side · r, side · r], each of parts that follow
    each other, line by line."""
    _, channels, r, _ = parts.shape
    grid = parts.reshape(-1, side, side, channels, r, r).transpose(0, 3, 1, 4, 2, 5)
    return np.ascontiguousarray(grid.reshape(-1, channels, side * r, side * r))


def run(settings: Given, context: Context) -> dict[str, Any]:
    """Write a distilled set of real crops, with their provenance.

    A class is the unit of work: its crops, scores and batches do not depend on which rank does it.
    """
    ranks, split = context.ranks, ShardSplit(context.input("shard"), "train")
    initialize, seen = settings.initialize, settings.images
    teacher = None
    if initialize.needs_teacher:
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
    facts: dict[str, Any] = {}
    if not initialize.crop_scale:
        crops, facts = _with_areas(crops, context)
    choose = random if initialize.select == "random" else judged
    mine = sampling.spread(split.counts, ranks.world_size)[ranks.rank]
    names = split.names
    progress = context.progress("initialize", len(mine), "classes")
    for k, label in enumerate(mine):
        # Written after the images: both are there, or the class is done again.
        if not distilled.provenance_file(context.out, label).exists():
            plans, rows = choose(crops, label, np.flatnonzero(split.labels == label))
            for row in rows:
                row["source"] = names[row["image"]]
            pixels = make(crops, plans)
            distilled.write_class(context.out, label, pixels, _by_image(rows, initialize.mosaic))
        progress.update(k + 1)
    ranks.barrier()
    further = _further(context, len(split.classes))
    return {"classes needing further crops": further, **facts}


def _with_areas(crops: Crops, context: Context) -> tuple[Crops, dict[str, Any]]:
    """`crops` with the areas that the teacher still knows, and what to record of them."""
    teacher, resolution = crops.teacher, crops.spec.resolution
    assert teacher is not None, "areas are found with the teacher"
    shares = areas.kept(teacher, crops.images, crops.normalize, context.ranks, resolution)
    low = areas.smallest(shares, crops.settings.keep)
    told = ", ".join(f"{100 * share:.0f} % at {area:g}" for area, share in shares.items())
    context.say(
        f"initialize: crops keep of the teacher's confidence, by area: {told}; "
        + (f"areas from {low:g} to 1 are drawn" if low < 1 else "images stay whole")
    )
    facts = {
        "crop_scale": [low, 1.0],
        "confidence kept": {f"{area:g}": round(share, 4) for area, share in shares.items()},
    }
    return replace(crops, spec=replace(crops.spec, crop_scale=(low, 1.0))), facts


def _by_image(rows: Rows, side: int) -> Rows:
    """A row an image; of a mosaic it lists the rows of the parts, line by line."""
    if side == 1:
        return rows
    parts = side**2
    return [{"parts": rows[i : i + parts]} for i in range(0, len(rows), parts)]


def _further(context: Context, num_classes: int) -> int:
    """Classes for which one draw of crops was not enough."""
    tables = (distilled.provenance_file(context.out, c) for c in range(num_classes))
    return sum(_attempts(files.read_json(table)) > 1 for table in tables)


def _attempts(rows: Rows) -> int:
    crops = [crop for row in rows for crop in row.get("parts", [row])]
    return 1 + max(crop.get("attempt", 0) for crop in crops)
