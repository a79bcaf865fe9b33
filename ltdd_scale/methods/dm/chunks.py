"""How matching is cut, what it costs, and whether its settings can work. No images here.

Classes do not know of each other, and each goes through the networks alone. So a chunk is only a
unit of work: which classes share it changes no byte.
"""

from __future__ import annotations

from typing import Any

from ltdd_scale.errors import UserError
from ltdd_scale.stage import Cost, Facts

# A chunk's classes share the random networks, which takes time for itself where classes are many.
MOST = 64  # chunks of a run, at most


def divide(num_classes: int) -> list[tuple[int, ...]]:
    """The classes of each chunk. Chunk g of G takes classes g, g + G, …: head and tail in each, so
    that chunks take equally long."""
    size = -(-num_classes // MOST)
    groups = -(-num_classes // size)
    return [tuple(range(g, num_classes, groups)) for g in range(groups)]


def pieces(settings: Any, facts: Facts) -> int:
    """The number of chunks: more ranks than these have nothing to do."""
    return len(divide(facts.num_classes))


def cost(settings: Any, facts: Facts) -> Cost:
    """A pass over the real images; over the synthetic ones forward and, to the pixels, backward."""
    from ltdd_scale.data import whitening
    from ltdd_scale.models import flops  # torch: only where it is asked for

    dm, ipc, size = settings.dm, settings.ipc, settings.images.resolution
    one = flops.measure(dm.net, dm.width, dm.norm, size)
    shown = [min(dm.real_batch, n) if n > ipc else ipc for n in facts.counts]
    images = sum(shown) + 2 * ipc * facts.num_classes
    pixels = 3 * size * size
    held = max(sum(facts.counts[c] for c in chunk) for chunk in divide(facts.num_classes))
    return Cost(
        flops=dm.iterations * (images * one.flops + whitening.flops(settings, images)),
        decodes=facts.num_images,
        steps=dm.iterations * len(divide(facts.num_classes)),
        memory=held * pixels + whitening.held(settings, inverse=True),
        activations=max(shown) * (one.passing + 4 * pixels) + ipc * (one.activations + 4 * pixels),
        disk=ipc * facts.num_classes * pixels,
    )


def check(settings: Any) -> None:
    """Raise `UserError` for an unknown augmentation, and for a network that has BatchNorm or cannot
    take the images."""
    from ltdd_scale.data import siamese
    from ltdd_scale.models import flops

    dm = settings.dm
    siamese.choices(dm.dsa)
    if flops.norm_layers(dm.net, dm.width, dm.norm, settings.images.resolution):
        raise UserError(
            f"dm.net={dm.net} has BatchNorm, which means nothing where a class is alone in a "
            "batch: use convnet3 or convnet4"
        )
