"""How small a crop may be before a trained network no longer knows it for its class.

A rule in place of a number that is tuned for each set: crops of an object's photograph show most of
it, crops of a digit may show another digit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from ltdd_scale.data import sampling
from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.images import Images, Plan
from ltdd_scale.models.frozen import Frozen
from ltdd_scale.runtime import signals
from ltdd_scale.runtime.ranks import Ranks, rng

AREAS = (0.35, 0.5, 0.7, 0.85, 1.0)  # of a crop, as shares of the image's; the last is the whole
PER_CLASS = 20  # images of a class that are looked at, at most


def kept(
    network: Frozen,
    images: Images,
    normalize: Callable[[Tensor], Tensor],
    ranks: Ranks,
    resolution: int,
    per_class: int = PER_CLASS,
) -> dict[float, float]:
    """What crops of each of `AREAS` keep of the network's confidence: area → share.

    The network's confidence is its probability of an image's own class, averaged over the images of
    a class and then over classes, so that every class weighs the same. The share is that on one
    crop of each image over that on whole images; it can be above 1. At most `per_class` images of a
    class are looked at, the same at each area, and the same on every call. Ranks share the classes
    out, and every rank returns the same numbers, whatever the number of ranks.
    """
    counts = images.counts
    mine = sampling.spread(np.minimum(counts, per_class), ranks.world_size)[ranks.rank]
    mine = [c for c in mine if counts[c]]
    # No mirror images: the crop alone makes the difference.
    spec = ViewSpec(resolution, (AREAS[0], 1.0), mirror=False)
    means = torch.zeros(len(AREAS), len(counts), dtype=torch.float64)
    places = ((a, c) for c in mine for a in range(len(AREAS)))
    stream = images.stream(_plans(images, mine, per_class, resolution), spec)
    for (a, c), x in zip(places, stream, strict=True):
        signals.check()
        means[a, c] = network.logits(normalize(x)).double().softmax(1)[:, c].mean().cpu()
    # A class's numbers are one rank's; all others add zeros.
    confidence = ranks.all_reduce(means).numpy()[:, counts > 0].mean(1)
    shares = (confidence / confidence[-1]).tolist()
    return dict(zip(AREAS, shares, strict=True))


def _plans(images: Images, classes: list[int], per_class: int, resolution: int) -> Iterator[Plan]:
    """For each class the same images at each area in turn."""
    for c in classes:
        generator = rng("crop areas", c)
        members = np.flatnonzero(images.labels == c)
        members = np.sort(generator.permutation(members)[:per_class])
        for area in AREAS:
            spec = ViewSpec(resolution, (area, area), mirror=False)
            yield members, spec.draw(generator, images.sizes[members])


def smallest(shares: dict[float, float], keep: float) -> float:
    """The smallest area such that crops of it, and of each larger one of `shares`, keep at least
    `keep` of the confidence. Whole images always do."""
    found = 1.0
    for area in sorted(shares, reverse=True):
        if area < 1.0 and shares[area] < keep:
            break
        found = area
    return found
