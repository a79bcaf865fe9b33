"""What a trained network says of real images and of their classes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ltdd_scale.data.augment import ViewSpec
from ltdd_scale.data.loader import stream_images
from ltdd_scale.data.settings import Seen
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.errors import UserError
from ltdd_scale.judging.criteria import Described, quietly
from ltdd_scale.models.frozen import Frozen, together
from ltdd_scale.runtime import signals
from ltdd_scale.runtime.ranks import rng


@dataclass(frozen=True)
class Shown:
    """Whole images of one split as networks see them. `normalize` takes images float [n, 3, R, R]
    in [0, 1]."""

    split: ShardSplit
    seen: Seen
    normalize: Callable[[Tensor], Tensor]
    device: torch.device
    workers: int

    def batches(self, parts: list[np.ndarray]) -> Iterator[Tensor]:
        """Normalised images float [n, 3, R, R] of each of `parts`, indices int [n]."""
        streamed = stream_images(self.split, self.seen, self.device, self.workers)
        plans = [(part, None) for part in parts]
        for x in streamed.stream(plans, ViewSpec(self.seen.resolution)):
            signals.check()
            yield self.normalize(x)

    def each(
        self, parts: list[np.ndarray], function: Callable[[Tensor], Tensor]
    ) -> Iterator[Tensor]:
        """function(images), [n, …], of each of `parts`, of which none is empty. `function` sees
        some images at a time, and looks at each alone."""
        batch = together(self.seen.resolution)
        cut = [np.split(part, range(batch, len(part), batch)) for part in parts]
        batches = self.batches([piece for pieces in cut for piece in pieces])
        for pieces in cut:
            yield torch.cat([function(x) for x in itertools.islice(batches, len(pieces))])


def chosen(labels: np.ndarray, num_classes: int, per_class: int) -> list[np.ndarray]:
    """At most `per_class` images of each class: sorted indices into `labels` int64 [N]. Always the
    same ones."""
    out = []
    for c in range(num_classes):
        members = np.flatnonzero(labels == c)
        draw = rng("images that are looked at", c).permutation(len(members))
        out.append(np.sort(members[draw[:per_class]]))
    return out


def describe(
    network: Frozen,
    shown: Shown,
    per_class: int,
    num_centres: int = 0,
    confused: Shown | None = None,
) -> Described:
    """What `network` says of each class by at most `per_class` images of it.

    `num_centres` k-means centres of the features of a class, 0 for none. `confused`: the images
    that the soft confusion is measured on, None for none of it. Features of one class are held at a
    time.
    """
    names, means, centres = shown.split.classes, [], []
    parts = chosen(shown.split.labels, len(names), per_class)
    _refuse_empty(parts, names)
    for found in shown.each(parts, network.features):
        features = found.cpu().numpy().astype(np.float64)
        means.append(features.mean(0))
        if num_centres:
            centres.append(class_centres(features, num_centres))
    return Described(
        means=np.stack(means),
        names=names,
        centres=centres if num_centres else None,
        confusion=None if confused is None else soft_confusion(network, confused, per_class),
    )


def class_centres(features: np.ndarray, num_centres: int) -> np.ndarray:
    """k-means centres [min(M, n), d] of `features` float64 [n, d], from a fixed seed."""
    from sklearn.cluster import KMeans

    k = min(num_centres, len(features))
    with quietly():
        return KMeans(k, n_init=3, random_state=0).fit(features).cluster_centers_


def soft_confusion(network: Frozen, shown: Shown, per_class: int) -> np.ndarray:
    """Mean probabilities of the images of each class, float64 [C, C]; rows are the true classes."""
    names = shown.split.classes
    parts = chosen(shown.split.labels, len(names), per_class)
    _refuse_empty(parts, names)
    found = shown.each(parts, network.logits)
    rows = [logits.double().softmax(1).mean(0).cpu() for logits in found]
    return torch.stack(rows).numpy()


def _refuse_empty(parts: list[np.ndarray], names: list[str]) -> None:
    for part, name in zip(parts, names, strict=True):
        if not len(part):
            raise UserError(f"two_stage: class {name} has no images to group it by")
