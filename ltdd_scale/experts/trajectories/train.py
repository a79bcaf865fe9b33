"""Stage "trajectory": an expert trained on the real set, its weights kept on the way (MTT §3.1).

Steps count, not epochs: with a small set an epoch is a few steps. Everything is a pure function of
the seed, the expert and the step.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ltdd_scale.data import siamese
from ltdd_scale.data.loader import open_images, prepare
from ltdd_scale.data.settings import Seen
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.errors import UserError
from ltdd_scale.experts.trajectories import descent
from ltdd_scale.experts.trajectories.descent import Batches, Course
from ltdd_scale.experts.trajectories.kept import Form
from ltdd_scale.experts.trajectories.orders import Order, Uniform
from ltdd_scale.experts.trajectories.settings import Descent, Network
from ltdd_scale.models import registry
from ltdd_scale.models.flat import Flat
from ltdd_scale.runtime.context import Context
from ltdd_scale.stage import Given


def check(settings: Given) -> None:
    """Raise `UserError` for a network that has BatchNorm or cannot take the images, an unknown
    augmentation, and snapshots that there are no steps for."""
    trajectory = settings.trajectory
    check_network(trajectory, settings.images)
    check_steps("trajectories", trajectory)
    there = trajectory.steps // trajectory.every
    if trajectory.keep > there:
        raise UserError(
            f"trajectories.keep={trajectory.keep}, but {trajectory.steps} steps make {there} "
            f"snapshots, one every {trajectory.every} steps: lower trajectories.keep or raise "
            "trajectories.steps"
        )


def check_network(network: Network, seen: Seen) -> None:
    siamese.choices(network.dsa)
    made_of = (network.net, network.width, network.norm, seen.resolution)
    registry.check(*made_of)
    try:
        Flat(*made_of, num_classes=2)
    except UserError as error:
        raise UserError(f"trajectories.net: {error}") from None


def check_steps(section: str, own: Descent) -> None:
    if own.every > own.steps:
        raise UserError(
            f"{section}.every={own.every}: there is no snapshot in {section}.steps={own.steps}; "
            "lower it"
        )


def run(settings: Given, context: Context) -> dict[str, Any]:
    """Train one expert; write its snapshots, its last weights and ``log.jsonl``."""
    trajectory, expert, device = settings.trajectory, settings.expert, context.ranks.device
    split = ShardSplit(context.input("shard"), "train")
    flat = network(trajectory, settings.images, len(split.classes))
    key = (settings.seed, "trajectory", expert)

    def loss(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(flat.logits(theta, x), y)

    made = trajectory.steps // trajectory.every
    kept = min(trajectory.keep, made) if trajectory.keep else made
    order = Uniform(len(split), trajectory.batch_size, *key)
    course = Course(
        name=f"trajectory {expert}",
        section="trajectories",
        settings=trajectory,
        form=Form(kept + 1, flat.size, trajectory.every, trajectory.stored),
        batches=batches(settings, trajectory, order, split, context, key),
        loss=loss,
    )
    theta, history = descent.descend(course, flat.initial(*key, "weights").to(device), context)
    found = descent.accuracy(lambda x: flat.logits(theta, x), course.batches, len(split.classes))
    return facts(course, history, found)


def network(made_of: Network, seen: Seen, num_classes: int) -> Flat:
    return Flat(made_of.net, made_of.width, made_of.norm, seen.resolution, num_classes)


def batches(
    settings: Given,
    shown: Network,
    order: Order,
    split: ShardSplit,
    context: Context,
    key: tuple[int | str, ...],
) -> Batches:
    """The real images in `order`, changed as `shown` says."""
    seen, device = settings.images, context.ranks.device
    return Batches(
        images=open_images(split, seen, device, context.workers),
        order=order,
        normalize=prepare(split, device, context.inputs.get("zca")),
        strategy=siamese.choices(shown.dsa, seen.mirror),
        size=seen.resolution,
        device=device,
        key=(*key, "dsa"),
    )


def facts(course: Course, history: list[dict[str, Any]], found: dict[str, float]) -> dict[str, Any]:
    """What ``stage.json`` and the line of progress say."""
    loss = history[-1]["loss"]
    note = f"loss {loss:.3f}, {found['accuracy']:.1f} % of the training images"
    done = {"steps": course.settings.steps, "snapshots": course.form.count, "loss": loss}
    return {**done, **found, "note": f"{note} (balanced {found['balanced']:.1f})"}
