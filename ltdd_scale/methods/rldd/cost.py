"""What the stages of the method cost: FLOPs in all, memory of one rank, bytes on the disk.

Estimates to plan with.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from ltdd_scale.methods.rldd import chunks, guard, matched
from ltdd_scale.methods.rldd.settings import Net
from ltdd_scale.models import areas, flops, registry
from ltdd_scale.stage import Cost, Facts

FLOAT64 = 8  # bytes


def calibrate(settings: Any, facts: Facts) -> Cost:
    """A pass over the set a layer, up to that layer; or, with a lead, over the lead, and one over
    the set, three times (which is assumed: it ends when it is close); or one pass; or none."""
    own, seen = settings.calibrate, settings.images
    observer = _measure(settings.observer, seen.resolution)
    held = _weights(observer, facts)
    if not own.fair:
        return Cost(memory=held, disk=held)
    passes = 1.0
    if own.recalibrate:
        passes = (observer.norm_layers + 1) / 2 + own.conv_inputs
        if own.lead:
            lead = sum(min(n, own.lead) for n in facts.counts)
            passes = 3 * (1 + (observer.norm_layers + 1) / 2 * lead / facts.num_images)
    batch = min(own.batch_size, facts.num_images)
    moments = _moments(settings.observer, seen.resolution, own.conv_inputs, facts)
    kept = min(_images(facts.num_images, seen), seen.memory_gb * 2**30)  # or in a file
    return Cost(
        flops=passes * facts.num_images * observer.flops,
        decodes=facts.num_images,
        # While the file is written, its bytes are there thrice beside the moments.
        memory=held + kept + 4 * moments,
        activations=batch * observer.passing,
        disk=held + moments,
    )


def initialize(settings: Any, facts: Facts) -> Cost:
    """The teacher sees every crop of every image, and a few of each class to find their areas."""
    own, seen = settings.initialize, settings.images
    images = _images(facts.num_classes * settings.ipc, seen)
    if not own.needs_teacher:
        memory = _decoded(seen, facts) + _images(settings.ipc * own.mosaic**2, seen)
        return Cost(memory=memory, disk=images)
    teacher = _measure(settings.teacher, seen.resolution)
    draws = own.draws(own.crop_scale) if own.select != "random" else 0
    shown = facts.num_images * draws
    if not own.crop_scale:
        shown += len(areas.AREAS) * sum(min(n, areas.PER_CLASS) for n in facts.counts)
    batch = min(own.batch_size, max(facts.counts) * max(draws, 1))
    features = FLOAT64 * max(facts.counts) * draws * teacher.features if own.by_features else 0.0
    return Cost(
        flops=shown * teacher.flops,
        decodes=facts.num_images,
        memory=_weights(teacher, facts) + _decoded(seen, facts) + features,
        activations=batch * teacher.passing,
        disk=images,
    )


def recover(settings: Any, facts: Facts) -> Cost:
    """Forward passes and input gradients (as much again) of the observer, of the teacher where it
    guards the images, and of random networks where they are matched."""
    own, seen = settings.recover, settings.images
    observer = _measure(settings.observer, seen.resolution)
    teacher = _measure(settings.teacher, seen.resolution) if own.needs_teacher else None
    nets = [observer, *([teacher] if teacher and own.teacher_ce else [])]
    small = facts.num_classes * settings.ipc
    groups, each = chunks.groups(facts.num_classes, settings.ipc, own.batch_size, own.chunk_classes)
    batch = min(own.batch_size, small)
    moments = _moments(settings.observer, seen.resolution, settings.conv_inputs, facts)
    added = _matching(settings, facts) if own.matching else Cost()
    looks, again = 0, 0  # at whole images, by the teacher; by the observer
    if teacher and own.iterations:
        again = (1 + len(guard.STEPS)) * (own.settle > 0)
        looks = own.weighs_images + (1 + len(guard.checks(own.iterations))) * (own.stop > 0)
    return Cost(
        flops=own.iterations * small * 2 * sum(m.flops for m in nets)
        + ((looks + again) * small * teacher.flops if teacher else 0.0)
        + again * small * observer.flops
        + added.flops,
        decodes=added.decodes,
        steps=own.iterations * len(groups) * each,
        memory=sum(_weights(m, facts) for m in (observer, teacher) if m)
        + 2 * moments
        + added.memory,
        activations=batch * sum(m.activations for m in nets) + added.activations,
        disk=_images(small, seen),
    )


def _matching(settings: Any, facts: Facts) -> Cost:
    """What the matching term adds: a pass over real images of each class of a chunk, forward and
    back over the chunk's own. What a chunk holds of a class is bounded; where all chunks would
    decode more images than there are, and these fit in memory, all are held."""
    own, seen, ipc = settings.recover, settings.images, settings.ipc
    one = flops.measure(*matched.network_shape(own, seen.resolution))
    groups, each = chunks.groups(facts.num_classes, ipc, own.batch_size, own.chunk_classes)
    shown = own.matching_real * facts.num_classes * each
    most = matched.held(own)
    held = max(sum(min(facts.counts[k], most) for k in group) for group in groups)
    changed = flops.FLOAT * _images(1, seen)  # an image after the augmentation
    batch = min(own.batch_size, facts.num_classes * ipc)
    real = min(matched.together(own), facts.num_classes) * own.matching_real
    decodes = each * sum(min(n, most) for n in facts.counts)
    whole = _decoded(seen, facts) if decodes > facts.num_images else 0.0
    return Cost(
        flops=own.iterations * (shown + 2 * ipc * facts.num_classes) * one.flops,
        decodes=facts.num_images if whole else decodes,
        memory=whole + _images(held, seen) + flops.FLOAT * one.parameters,
        activations=batch * (one.activations + changed) + real * (one.passing + changed),
    )


def _measure(net: Net, size: int) -> flops.Measures:
    return flops.measure(net.net, net.width, net.norm, size)


def _weights(measures: flops.Measures, facts: Facts) -> float:
    """Bytes of a network with its two heads."""
    heads = 2 * facts.num_classes * (measures.features + 1)
    return flops.FLOAT * (measures.parameters + heads)


def _images(number: int, seen: Any) -> float:
    """Bytes of images, uint8 [n, 3, R, R]."""
    return float(seen.decoded(number))


def _decoded(seen: Any, facts: Facts) -> float:
    """Bytes of the real set where it is held in memory."""
    return _images(facts.num_images, seen) if seen.fits(facts.num_images) else 0.0


def _moments(net: Net, size: int, conv_inputs: bool, facts: Facts) -> float:
    """Bytes of ``statistics.pt``: float64 [K, 1 + 2C] a layer."""
    return 8.0 * facts.num_classes * _columns(net.net, net.width, net.norm, size, conv_inputs)


@cache
def _columns(net: str, width: int, norm: str, size: int, conv_inputs: bool) -> int:
    with registry.on_meta(net):
        model = registry.backbone(net, width, norm, size)
    channels = [layer.num_features for layer in registry.norm_layers(model).values()]
    if conv_inputs:
        channels += [layer.in_channels for layer in registry.conv_layers(model).values()]
    return sum(1 + 2 * c for c in channels)
