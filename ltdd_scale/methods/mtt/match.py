"""Stage "match": images on which a student goes the way of experts (MTT, CVPR 2022).

    θ_0 = θ*_s;  θ_{i+1} = θ_i − β ∇θ ℓ(θ_i; A(x_i), y_i), i < N
    min_{S, β} E ‖θ_N − θ*_{s+M}‖² / ‖θ*_s − θ*_{s+M}‖²

θ*_k are the weights of an expert, trained on the real set, at snapshot k. Expert and start are
drawn anew in each iteration. `methods/matching/unroll.py` has the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ltdd_scale.data import siamese
from ltdd_scale.methods.matching import experts, segments
from ltdd_scale.methods.matching.experts import Experts
from ltdd_scale.methods.matching.real import open_real
from ltdd_scale.methods.matching.saved import Saved
from ltdd_scale.methods.matching.segments import Matching, Synthetic, Weighted
from ltdd_scale.methods.matching.unroll import Segment
from ltdd_scale.methods.mtt.settings import Mtt
from ltdd_scale.runtime.context import Context
from ltdd_scale.stage import Given


def run(settings: Given, context: Context) -> dict[str, Any]:
    """Write a distilled set that starts from random real images, and the learned rate."""
    own, seen, ranks = settings.mtt, settings.images, context.ranks
    pixels, real = open_real(settings.ipc, settings.seed, seen, context)
    num_classes = len(real.start)
    ways = experts.load(settings.trajectory, seen.resolution, num_classes, context)
    start = pixels.normalized(torch.from_numpy(real.initial()).to(ranks.device))
    classes = torch.arange(num_classes, device=ranks.device).repeat_interleave(settings.ipc)
    synthetic = Synthetic(start, F.one_hot(classes, num_classes).float(), own)
    pick = Pick(own, ways, start, siamese.choices(own.dsa, seen.mirror), settings.seed)
    matching = Matching("mtt", own, synthetic, pixels, pick, ranks, Saved(context))
    segments.run(matching, context)
    return segments.write(matching, real, context)


@dataclass(frozen=True)
class Pick:
    """What an iteration matches. `images`: the set's, of which only number and side count."""

    own: Mtt
    ways: Experts
    images: Tensor
    strategy: tuple[str, ...]
    seed: int

    def __call__(self, t: int, j: int) -> list[Weighted]:
        """The segment of iteration t with number j."""
        own, device = self.own, self.images.device
        sizes = (own.inner_steps, min(own.batch_size, len(self.images)), len(self.images))
        starts, key = (own.min_start, own.max_start), (self.seed, "mtt", t, j)
        drawn = segments.draw(key, len(self.ways), starts, sizes, self.strategy, self.images)
        begin, end = self.ways.way(drawn.expert, drawn.start, drawn.start + own.target, device)
        name = f"expert {drawn.expert} from snapshot {drawn.start}"
        whole, nothing = slice(0, len(begin)), begin[:0]
        how = (whole, drawn.batches, drawn.augment, self.logits, self.loss, nothing)
        return [Weighted(1.0, Segment(name, begin, end, *how))]

    def logits(self, theta: Tensor, x: Tensor, _: Tensor) -> Tensor:
        return self.ways.flat.logits(theta, x)

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """The cross-entropy with classes [b, C]."""
        return -(y * F.log_softmax(logits, 1)).sum(1).mean()
