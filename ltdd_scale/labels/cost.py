"""What the stage relabel costs."""

from __future__ import annotations

from typing import Any

from ltdd_scale.labels.catalog import KINDS
from ltdd_scale.models import flops
from ltdd_scale.stage import Cost, Facts

FP16 = 2  # bytes
FLOAT = 4


def stored_bytes(
    kind: str, images: int, num_classes: int, epochs: int, topk: int = 0
) -> int | None:
    """Bytes of the labels of a set of `images` images that is given away with labels of `kind`.

    None for labels that no table holds: the teacher has to come with the set. `epochs`: those that
    are stored; `topk`: the logits kept of each label, 0 for all. Numbers in the tables of classes
    and of the rest count too.
    """
    found = KINDS[kind]
    if found.each_view:
        return None
    if not found.teacher and not found.of_set:
        return 0
    if not found.views:
        return FLOAT * images * num_classes
    kept = 2 * topk + 1 if 0 < topk < num_classes else num_classes
    return FP16 * images * kept * epochs


def networks(settings: Any) -> int:
    """How many networks label (`stage.more_labellers`)."""
    return settings.labellers if "labellers" in settings else 1


def relabel(settings: Any, facts: Facts) -> Cost:
    """A pass of who labels for every label that is written; labels of the set are copied. The
    teacher's net stands for the observer's, where both label."""
    kind = KINDS[settings.labels]
    if kind.of_set:
        return Cost(disk=FLOAT * facts.num_classes**2 * settings.ipc)
    if not kind.teacher:
        return Cost()
    images, side = facts.num_classes * settings.ipc, settings.images.resolution
    net = (settings.net, settings.width, settings.norm, side)
    single = settings.single if kind.of_views else settings.relabel
    passes, bytes_a_label = single.views, FLOAT * facts.num_classes  # whatever the kind
    if kind.of_views:
        passes += settings.relabel.adjust
    if kind.views:
        epochs = settings.relabel.epochs or settings.student_epochs
        kept = min(settings.relabel.topk, facts.num_classes) or facts.num_classes
        two_tables = kept < facts.num_classes  # values with one for the rest, and classes
        passes += epochs
        bytes_a_label += epochs * FP16 * (2 * kept + 1 if two_tables else kept)
    passes *= networks(settings)
    held = min(images * 3 * side**2, settings.images.memory_gb * 2**30)
    batch = min(settings.relabel.batch_size, images)
    return Cost(
        flops=passes * images * flops.forward(*net),
        memory=held + networks(settings) * FLOAT * flops.parameters(*net),
        activations=batch * flops.measure(*net).passing,
        disk=images * bytes_a_label,
    )
