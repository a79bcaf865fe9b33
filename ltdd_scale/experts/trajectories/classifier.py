"""Stage "classifier": the head of a finished expert, trained once more on balanced batches (DAMED).

The backbone is the expert's after its last step, and stays. Classes take turns; MaxNorm limits the
rows of the head's weight, where it is wanted.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.errors import UserError
from ltdd_scale.experts.trajectories import descent, train
from ltdd_scale.experts.trajectories.descent import Course
from ltdd_scale.experts.trajectories.kept import Form, Kept
from ltdd_scale.experts.trajectories.orders import ClassAware
from ltdd_scale.runtime.context import Context
from ltdd_scale.stage import Given


def check(settings: Given) -> None:
    """Raise `UserError` for a network that has no trajectory, and steps without a snapshot."""
    train.check_network(settings.network, settings.images)
    train.check_steps("classifiers", settings.classifier)


def max_norm(head: Tensor, num_classes: int, most: float) -> None:
    """Rows of the weight of a `head` [C · d + C], in place, no longer than `most`."""
    weight = head[:-num_classes].view(num_classes, -1)
    norms = weight.norm(dim=1, keepdim=True)
    weight.mul_(most / norms.clamp(min=most))


def run(settings: Given, context: Context) -> dict[str, Any]:
    """Train one head; write its snapshots, its last weights and ``log.jsonl``."""
    own, expert, device = settings.classifier, settings.expert, context.ranks.device
    split = ShardSplit(context.input("shard"), "train")
    num_classes = len(split.classes)
    flat = train.network(settings.network, settings.images, num_classes)
    kept = Kept(context.input("trajectory"))
    if kept.size != flat.size:
        raise UserError(
            f"{kept.folder}: weights of {kept.size} numbers, but {settings.network.net} with "
            f"{num_classes} classes has {flat.size}: this expert is of another network"
        )
    theta = kept.last(device)
    key = (settings.seed, "classifier", expert)

    @torch.no_grad()
    def features(x: Tensor) -> Tensor:
        return flat.features(theta, x)

    def loss(head: Tensor, seen: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(flat.classify(head, seen), y)

    def limit(head: Tensor) -> None:
        if own.max_norm:
            max_norm(head, num_classes, own.max_norm)

    head = theta[flat.head]
    order = ClassAware(split.labels, own.batch_size, own.images_per_class, *key)
    course = Course(
        name=f"classifier {expert}",
        section="classifiers",
        settings=own,
        form=Form(own.steps // own.every + 1, len(head), own.every),
        batches=train.batches(settings, settings.network, order, split, context, key),
        loss=loss,
        see=features,
        limit=limit,
    )
    head, history = descent.descend(course, head, context)
    found = descent.accuracy(
        lambda x: flat.classify(head, features(x)), course.batches, num_classes
    )
    return train.facts(course, history, found)
