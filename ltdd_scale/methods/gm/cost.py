"""What gradient matching costs, and whether its settings can work. No images here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ltdd_scale.errors import UserError
from ltdd_scale.methods.gm.settings import Gm
from ltdd_scale.stage import Cost, Facts

GRADIENT = 3  # forward passes that an image costs: forward, and back to activations and weights
# The same for a synthetic image in an outer step. Back through the gradient each layer has three
# products more (two for the weights' gradient, one for the activations'), and one through forward.
TWICE = 7
GRAPHS = 2  # activations that a synthetic image holds in an outer step, in those of a forward pass


def efforts(gm: Gm, ipc: int, counts: Sequence[int]) -> list[int]:
    """Forward passes of one image that an outer step takes for each class: 0 for one with no more
    images than `ipc`, which does not move."""
    return [GRADIENT * min(gm.real_batch, int(n)) + TWICE * ipc if n > ipc else 0 for n in counts]


def cost(settings: Any, facts: Facts) -> Cost:
    """Gradients of real images, gradients with their own graph of synthetic ones, and the training
    of the networks between the outer steps, which every rank does."""
    from ltdd_scale.data import whitening
    from ltdd_scale.models import flops  # torch: only where it is asked for

    gm, ipc, size = settings.gm, settings.ipc, settings.images.resolution
    one = flops.measure(gm.net, gm.width, gm.norm, size)
    pixels, images = 3 * size * size, ipc * facts.num_classes
    outer = sum(efforts(gm, ipc, facts.counts))
    inner = gm.inner_epochs * images * GRADIENT
    passes = gm.networks * (gm.outer_steps * outer + (gm.outer_steps - 1) * inner)
    shown = max(min(gm.real_batch, n) for n in facts.counts)
    trained = min(gm.inner_batch, images) if gm.outer_steps > 1 else 0
    weights = one.parameters + (one.features + 1) * facts.num_classes
    # Images, momentum and gradients, and vectors of weights: theirs, and two gradients.
    held = flops.FLOAT * (3 * images * pixels + 4 * weights)
    seen = sum(min(gm.real_batch, n) for n in facts.counts) + 2 * images
    whitened = whitening.flops(settings, gm.networks * gm.outer_steps * seen)
    return Cost(
        flops=passes * one.flops + whitened,
        decodes=facts.num_images,
        steps=gm.networks * gm.outer_steps * (1 + gm.inner_epochs),
        memory=held + facts.num_images * pixels + whitening.held(settings, inverse=True),
        activations=max(shown, trained, GRAPHS * ipc) * (one.activations + flops.FLOAT * pixels),
        disk=images * pixels,
    )


def check(settings: Any) -> None:
    """Raise `UserError` for an unknown augmentation, and for a network that has BatchNorm or cannot
    take the images."""
    from ltdd_scale.data import siamese
    from ltdd_scale.models import flops

    gm = settings.gm
    siamese.choices(gm.dsa)
    if flops.norm_layers(gm.net, gm.width, gm.norm, settings.images.resolution):
        raise UserError(
            f"gm.net={gm.net} has BatchNorm, which means nothing where a class is alone in a "
            "batch: use convnet3 or convnet4"
        )
