"""Stage "match": trajectory matching for long tails (DAMED, CVPR 2025; first called LAD).

Two repairs of MTT, and learned labels:

1. Distribution-agnostic matching. The student's loss is weighted by class frequency,
   ℓ_w = −(1/b) Σ_i Σ_k w_k y_ik log p_ik,  w_k = C n_k / Σ_j n_j (mean 1: the paper's sum to 1, so
   that β would have to be C times as large). The student becomes as biased as the expert, so the
   images need not hold the bias.
2. Expert decoupling. An iteration has two segments: of the whole student, compared by its backbone;
   and of its classifier alone, on the frozen backbone of a finished expert, compared with one that
   was trained once more on balanced batches, with the plain loss. Their gradients are added with
   the weights λ1 and λ2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ltdd_scale.data import siamese
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.methods.damed.settings import Damed
from ltdd_scale.methods.matching import experts, segments
from ltdd_scale.methods.matching.experts import Experts
from ltdd_scale.methods.matching.real import open_real
from ltdd_scale.methods.matching.saved import Saved
from ltdd_scale.methods.matching.segments import Draws, Matching, Synthetic, Weighted
from ltdd_scale.methods.matching.unroll import Segment
from ltdd_scale.models.flat import in_tf32
from ltdd_scale.runtime.context import Context
from ltdd_scale.stage import Given

SURE = 0.9  # p of the own class in the label of an image that no expert classifies correctly
SHOWN = 100  # images in a forward pass of the experts


def run(settings: Given, context: Context) -> dict[str, Any]:
    """Write a distilled set that starts from random real images, its labels and rate."""
    own, seen, ranks = settings.damed, settings.images, context.ranks
    pixels, real = open_real(settings.ipc, settings.seed, seen, context)
    num_classes = len(real.start)
    ways = experts.load(settings.trajectory, seen.resolution, num_classes, context)
    start = pixels.normalized(torch.from_numpy(real.initial()).to(ranks.device))
    classes = torch.arange(num_classes, device=ranks.device).repeat_interleave(settings.ipc)
    labels = F.one_hot(classes, num_classes).float()
    if own.learn_labels:
        with in_tf32():
            labels = initial_labels(ways, start, classes)
        # Different GPUs could differ in the last bits.
        labels = ranks.broadcast_tensor(labels)
    synthetic = Synthetic(start, labels, own, own.learn_labels, own.lr_labels)
    counts = ShardSplit(context.input("shard"), "train").counts
    pair = Pair(
        own,
        ways,
        start,
        class_weights(counts, own.matching).to(ranks.device),
        siamese.choices(own.dsa, seen.mirror),
        settings.seed,
    )
    matching = Matching("damed", own, synthetic, pixels, pair.pick, ranks, Saved(context))
    segments.run(matching, context)
    return segments.write(matching, real, context)


def class_weights(counts: np.ndarray, weighted: bool = True) -> Tensor:
    """w_k = C n_k / Σ_j n_j, float32 [C], of mean 1; all 1 where they are not `weighted`."""
    w = counts * len(counts) / counts.sum() if weighted else np.ones(len(counts))
    return torch.from_numpy(w).float()


@torch.no_grad()
def initial_labels(ways: Experts, images: Tensor, classes: Tensor) -> Tensor:
    """Logits float32 [n, C] of images [n, 3, R, R] of `classes` int64 [n]: the mean over experts of
    the last logits, of those experts that classify the image correctly.

    The head is the balanced one where there is one. Where no expert is right the released code
    gives zeros, a label of every class. Here the own class has p = .9, the others share the rest.
    """
    num_classes = ways.flat.model.fc.out_features
    total = torch.zeros(len(images), num_classes, device=images.device)
    right = torch.zeros(len(images), 1, device=images.device)
    for k, way in enumerate(ways.ways):
        theta = way.last(images.device)
        head = ways.heads[k].last(images.device) if ways.heads else theta[ways.flat.head]
        parts = [ways.flat.features(theta, x) for x in images.split(SHOWN)]
        logits = ways.flat.classify(head, torch.cat(parts))
        correct = (logits.argmax(1) == classes)[:, None].float()
        total += correct * logits
        right += correct
    sure = torch.full_like(total, (1 - SURE) / max(num_classes - 1, 1)).log()
    sure.scatter_(1, classes[:, None], float(np.log(SURE)))
    return torch.where(right > 0, total / right.clamp(min=1), sure)


@dataclass(frozen=True)
class Pair:
    """What an iteration matches. `weights` float32 [C] of the classes, `images` the set's, of which
    only number and side count."""

    own: Damed
    ways: Experts
    images: Tensor
    weights: Tensor
    strategy: tuple[str, ...]
    seed: int

    def pick(self, t: int, j: int) -> list[Weighted]:
        """The segments of iteration t with number j: of the backbone, and of the classifier."""
        own = self.own
        if not own.decoupling:
            return [Weighted(1.0, self.network(t, j))]
        backbone = Weighted(own.backbone_weight, self.network(t, j))
        return [backbone, Weighted(own.classifier_weight, self.classifier(t, j))]

    def last_start(self, t: int) -> int:
        """The last snapshot that a segment of iteration t starts from (DATM: easy patterns first,
        that is early ones)."""
        own = self.own
        if not own.current_start:
            return own.max_start
        grown = (own.max_start - own.current_start) * min(t / own.expansion, 1.0)
        return max(own.min_start, own.current_start + int(grown))

    def network(self, t: int, j: int) -> Segment:
        """All weights are trained, with the weighted loss. Only the backbone is compared, where the
        classifier has a segment of its own."""
        own, flat = self.own, self.ways.flat
        starts = (own.min_start, self.last_start(t))
        drawn = self._draw("damed", t, j, starts, own.inner_steps)
        begin, end = self.ways.way(
            drawn.expert, drawn.start, drawn.start + own.target, self.images.device
        )

        name = f"expert {drawn.expert} from snapshot {drawn.start}"
        compared = flat.backbone if own.decoupling else slice(0, flat.size)
        how = (
            compared,
            drawn.batches,
            drawn.augment,
            self.network_logits,
            self.weighted_loss,
            begin[:0],
        )
        return Segment(name, begin, end, *how)

    def classifier(self, t: int, j: int) -> Segment:
        """Only the head is trained, from a finished expert's, with the plain loss."""
        own, device = self.own, self.images.device
        drawn = self._draw("damed classifier", t, j, (0, 0), own.classifier_steps)
        finished, head = self.ways.ways[drawn.expert].last(device), self.ways.heads[drawn.expert]
        begin, end = head.vector(0, device), head.vector(own.classifier_target, device)
        name, whole = f"classifier of expert {drawn.expert}", slice(0, len(begin))
        how = (whole, drawn.batches, drawn.augment, self.head_logits, self.plain_loss, finished)
        return Segment(name, begin, end, *how)

    def network_logits(self, theta: Tensor, x: Tensor, _: Tensor) -> Tensor:
        """Of all weights `theta`."""
        return self.ways.flat.logits(theta, x)

    def head_logits(self, head: Tensor, x: Tensor, finished: Tensor) -> Tensor:
        """Of a `head` on the backbone of an expert that is `finished`."""
        return self.ways.flat.classify(head, self.ways.flat.features(finished, x))

    def weighted_loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """ℓ_w."""
        return (self._by_class(logits, y) * self.weights).sum(1).mean()

    def plain_loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return self._by_class(logits, y).sum(1).mean()

    def _draw(self, purpose: str, t: int, j: int, starts: tuple[int, int], steps: int) -> Draws:
        own, count = self.own, len(self.images)
        sizes = (steps, min(own.batch_size, count), count)
        key = (self.seed, purpose, t, j)
        return segments.draw(key, len(self.ways), starts, sizes, self.strategy, self.images)

    def _by_class(self, logits: Tensor, y: Tensor) -> Tensor:
        """−y_k log p_k, [b, C]."""
        targets = F.softmax(y, 1) if self.own.learn_labels else y
        return -targets * F.log_softmax(logits, 1)
