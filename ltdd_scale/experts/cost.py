"""What training an expert asks of a machine: an order of magnitude, not a promise."""

from __future__ import annotations

from collections import Counter

from ltdd_scale.experts import growth
from ltdd_scale.experts.recipes import RECIPES
from ltdd_scale.models import flops, registry
from ltdd_scale.stage import Cost, Facts, Given

CHECKPOINTS = 3  # on the disk at once: two that stay, and the one that is being written


def cost(settings: Given, facts: Facts) -> Cost:
    """FLOPs of all epochs, memory, disk.

    Memory of a rank: weights, gradients and the optimizer's moments, and the decoded set where it
    is held in memory. The activations of a batch in float32 are shared out over ranks, unless each
    rank has its micro-batch. Raises `UserError` for a net that cannot take the images.
    """
    expert, seen, train = settings.expert, settings.images, settings.train
    net = (expert.net, expert.width, expert.norm, seen.resolution)
    growth.check(settings.role, expert, train, seen.resolution)
    mixing = RECIPES[expert.recipe].mixing(expert)
    views, streams = mixing.views, len(mixing.powers)
    sides = Counter(growth.sides(expert, seen.resolution))
    work = sum(epochs * flops.forward(*net[:3], side) for side, epochs in sides.items())
    one = views * flops.activations(*net)
    micro = min(train.micro_batch, expert.batch_size)
    steps = expert.epochs * (facts.num_images // expert.batch_size)
    parameters, buffers = _numbers(settings, facts.num_classes)
    held, fits = seen.decoded(facts.num_images), seen.fits(facts.num_images)
    moments = 2 if expert.optimizer == "adamw" else 1
    memory = flops.FLOAT * (2 + moments) * parameters
    return Cost(
        flops=facts.num_images * views * work * (1 + flops.BACKWARD),
        decodes=facts.num_images * (1 if fits else expert.epochs * streams),
        steps=steps,
        # A BatchNorm over all ranks waits in the forward and in the backward pass.
        meetings=2.0 * steps * flops.norm_layers(*net) if train.sync_bn else 0.0,
        memory=memory + (held if fits else 0),
        activations=micro * one,
        batch=0.0 if micro else expert.batch_size * one,
        disk=flops.FLOAT
        * (parameters + buffers + CHECKPOINTS * ((1 + moments) * parameters + buffers)),
    )


def _numbers(settings: Given, num_classes: int) -> tuple[int, int]:
    """How many numbers are parameters, and how many buffers, of the expert with its heads."""
    expert, size = settings.expert, settings.images.resolution
    projection = RECIPES[expert.recipe].projection(expert)
    with registry.on_meta(expert.net):
        features = registry.backbone(expert.net, expert.width, expert.norm, size)
        model = registry.TwoHeads(features, num_classes, projection)
    return sum(p.numel() for p in model.parameters()), sum(b.numel() for b in model.buffers())
