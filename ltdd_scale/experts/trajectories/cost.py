"""What expert trajectories ask of a machine: an order of magnitude, not a promise."""

from __future__ import annotations

from ltdd_scale.data import whitening
from ltdd_scale.data.settings import Seen
from ltdd_scale.experts.trajectories.kept import HELD
from ltdd_scale.experts.trajectories.settings import Descent, Network
from ltdd_scale.models import flops
from ltdd_scale.stage import Cost, Facts, Given

CHECKPOINTS = 3  # on the disk at once: two that stay, and the one that is being written
COPIES = 6  # of the weights: themselves, gradients, velocity, a checkpoint's copy
SHORT = 2  # bytes of a bfloat16


def trajectory(settings: Given, facts: Facts) -> Cost:
    """Forward and backward passes of all steps; snapshots on the disk."""
    own, seen = settings.trajectory, settings.images
    made_of = (own.net, own.width, own.norm, seen.resolution)
    size = flops.parameters(*made_of) + _head(own, seen, facts)
    made = own.steps // own.every
    kept = (min(own.keep, made) if own.keep else made) + 1
    each = size * (SHORT if own.stored == "bfloat16" else flops.FLOAT)
    passes = (1 + flops.BACKWARD) * _gradients(own)
    return Cost(
        flops=own.steps * own.batch_size * passes * flops.forward(*made_of)
        + _whitened(settings, own),
        decodes=facts.num_images,
        steps=own.steps,
        memory=_held(settings, facts) + (COPIES + HELD) * flops.FLOAT * size,
        activations=own.batch_size * (flops.activations(*made_of) + _views(seen)),
        disk=kept * each + (1 + 2 * CHECKPOINTS) * flops.FLOAT * size,
    )


def classifier(settings: Given, facts: Facts) -> Cost:
    """One forward pass of the backbone a step, with GSAM too: the head costs next to nothing."""
    own, network, seen = settings.classifier, settings.network, settings.images
    one = flops.measure(network.net, network.width, network.norm, seen.resolution)
    size = _head(network, seen, facts)
    return Cost(
        flops=own.steps * own.batch_size * one.flops + _whitened(settings, own),
        decodes=facts.num_images,
        steps=own.steps,
        memory=_held(settings, facts) + flops.FLOAT * ((COPIES + HELD) * size + one.parameters),
        activations=own.batch_size * (one.passing + _views(seen)),
        disk=(own.steps // own.every + 2 + 2 * CHECKPOINTS) * flops.FLOAT * size,
    )


def _gradients(own: Descent) -> int:
    """Gradients a step."""
    return 2 if own.optimizer == "gsam" else 1


def _head(network: Network, seen: Seen, facts: Facts) -> int:
    """Numbers of the head."""
    features = flops.features(network.net, network.width, network.norm, seen.resolution)
    return facts.num_classes * (features + 1)


def _held(settings: Given, facts: Facts) -> float:
    """Bytes of the decoded set, where it is held in memory, and of the whitening."""
    seen = settings.images
    held = seen.decoded(facts.num_images) if seen.fits(facts.num_images) else 0
    return held + whitening.held(settings)


def _whitened(settings: Given, own: Descent) -> float:
    """FLOPs of whitening what is shown in all steps."""
    return whitening.flops(settings, own.steps * own.batch_size)


def _views(seen: Seen) -> float:
    """Bytes of an image and of what its augmentation makes of it."""
    return 4 * flops.FLOAT * 3 * seen.resolution**2
