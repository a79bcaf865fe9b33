"""Stage "embedding": judged images in the plane, by the features of trained networks (t-SNE)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ltdd_scale.data.loader import prepare
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.judging.criteria import quietly
from ltdd_scale.judging.features import Shown, chosen
from ltdd_scale.judging.saved import save_arrays
from ltdd_scale.models import frozen
from ltdd_scale.runtime import files
from ltdd_scale.runtime.context import Context

MOST = 2000  # images in all: 200 a class of ten classes
PERPLEXITY = 50.0


def run(settings: Any, context: Context) -> dict[str, Any]:
    """Write ``embedding.npz`` (`labels` int64 [n]; of the k-th network `xy_k` float32 [n, 2] and
    `centres_k` float32 [C, 2], NaN for classes without images) and ``embedding.json``."""
    shard, ranks = context.input("shard"), context.ranks
    train, held = ShardSplit(shard, "train"), ShardSplit(shard, settings.split)
    num_classes = len(train.classes)
    indices = np.concatenate(chosen(held.labels, num_classes, max(1, MOST // num_classes)))
    shown = Shown(
        held,
        settings.images,
        prepare(train, ranks.device, context.inputs.get("zca")),
        ranks.device,
        context.workers,
    )
    labels = held.labels[indices]
    arrays, perplexity = {"labels": labels}, perplexity_of(len(indices))
    for k, title in enumerate(settings.titles):
        network = frozen.load(context.input(title) / "weights.pt", ranks)
        xy, centres = embed(_features(network, shown, indices), labels, num_classes)
        arrays[f"xy_{k}"], arrays[f"centres_{k}"] = xy, centres
    told = {"titles": settings.titles, "perplexity": perplexity, "classes": train.classes}
    save_arrays(Path(context.out) / "embedding.npz", arrays)
    files.write_json(context.out / "embedding.json", told)
    return {"images": len(indices), "perplexity": perplexity}


def _features(network: frozen.Frozen, shown: Shown, indices: np.ndarray) -> np.ndarray:
    """Of the images `indices` int [n], float32 [n, d]. Put into one table as they come: of a wide
    network they are gigabytes, of which there are to be no copies."""
    batch, out = frozen.together(shown.seen.resolution), np.empty((0, 0), np.float32)
    starts = range(0, len(indices), batch)
    found = shown.batches([indices[i : i + batch] for i in starts])
    for start, x in zip(starts, found, strict=True):
        features = network.features(x).cpu().numpy()
        out = out if len(out) else np.empty((len(indices), features.shape[1]), np.float32)
        out[start : start + batch] = features
    return out


def perplexity_of(num_images: int) -> float:
    """50; a third of the images where they are too few for it."""
    return round(min(PERPLEXITY, max(1.0, (num_images - 1) / 3)), 2)


def embed(
    features: np.ndarray, labels: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """t-SNE of `features` float32 [n, d] and, together with them, of the mean feature of each
    class: float32 [n, 2] and [C, 2]. PCA start, fixed seed, one thread: always the same.

    Classes without images have NaN. Features that are all the same stay at 0.
    """
    from sklearn.manifold import TSNE

    there = np.unique(labels)
    means = np.stack([features[labels == c].mean(0) for c in there])
    points = np.concatenate([features, means.astype(features.dtype, copy=False)])
    xy = np.zeros((len(points), 2), np.float32)
    if len(points) > 3 and points.std(0).max() > 1e-6:
        with quietly():
            tsne = TSNE(
                perplexity=perplexity_of(len(features)), init="pca", random_state=0, n_jobs=1
            )
            xy = tsne.fit_transform(points)
    centres = np.full((num_classes, 2), np.nan, np.float32)
    centres[there] = xy[len(features) :]
    return xy[: len(features)].astype(np.float32), centres
