"""What the stage relabel costs."""

from __future__ import annotations

from typing import Any

from ltdd_scale.labels.catalog import KINDS
from ltdd_scale.models import flops
from ltdd_scale.stage import Cost, Facts

FP16 = 2  # bytes
FLOAT = 4


def relabel(settings: Any, facts: Facts) -> Cost:
    """A pass of the teacher for every label that is written; labels of the set are copied."""
    kind = KINDS[settings.labels]
    if kind.of_set:
        return Cost(disk=FLOAT * facts.num_classes**2 * settings.ipc)
    if not kind.teacher or (kind.each_view and not settings.relabel.adjust):
        return Cost()
    images, side = facts.num_classes * settings.ipc, settings.images.resolution
    net = (settings.net, settings.width, settings.norm, side)
    passes, bytes_a_label = 1, FLOAT * facts.num_classes
    if kind.views:
        epochs = settings.relabel.epochs or settings.student_epochs
        kept = min(settings.relabel.topk, facts.num_classes) or facts.num_classes
        two_tables = kept < facts.num_classes  # values with the mean of the rest, and classes
        passes = epochs + settings.relabel.adjust
        bytes_a_label = epochs * FP16 * (2 * kept + 1 if two_tables else kept)
    held = min(images * 3 * side**2, settings.images.memory_gb * 2**30)
    batch = min(settings.relabel.batch_size, images)
    return Cost(
        flops=passes * images * flops.forward(*net),
        memory=held + FLOAT * flops.parameters(*net),
        activations=batch * flops.measure(*net).passing,
        disk=0 if kind.each_view else images * bytes_a_label,
    )
