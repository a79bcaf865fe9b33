"""What students, groups of classes and the verdict cost."""

from __future__ import annotations

from typing import Any

from ltdd_scale.data import whitening
from ltdd_scale.judging import criteria
from ltdd_scale.judging.criteria import Wanted
from ltdd_scale.judging.lengths import epochs_of
from ltdd_scale.labels.catalog import KINDS, SINGLE
from ltdd_scale.labels.cost import networks, stored_bytes
from ltdd_scale.labels.stored import HELD
from ltdd_scale.models import flops, frozen
from ltdd_scale.results import CHOSEN, GROUPS_PART, WHOLE_SETS
from ltdd_scale.stage import Cost, Facts

FLOAT = 4  # bytes
DOUBLE = 8
TABLES = 8  # float64 [C, C], of the distances of classes
COPIES = 5  # of the weights: the student, its average, the gradient, two moments of Adam


def student(settings: Any, facts: Facts) -> Cost:
    """Epochs × images × (forward and backward pass, and the teacher's forward pass where it labels
    every view).

    A student of one group sees the images of the group. It holds those of all classes, as the
    labels of all of them are made: that needs a pass of the teacher where nobody has made them.
    """
    who, seen = settings.student, settings.images
    whole = who["set"] in WHOLE_SETS
    images = facts.num_images if whole else facts.num_classes * settings.ipc
    epochs = epochs_of(settings, images)
    held = _held(who["set"], images, facts, seen)
    teachers = networks(settings)
    labelled = _labelled(settings, epochs, images, facts.num_classes) * images * teachers
    if who.get("part", GROUPS_PART) != GROUPS_PART:  # those of one group; which is not known yet
        images = -(-images // settings.groups)
    net = (who["net"], settings.width, settings.norm, seen.resolution)
    kind, own, taught = KINDS[who["labels"]], flops.measure(*net), None
    if kind.teacher:
        taught = flops.measure(
            settings.teacher_net, settings.teacher_width, settings.teacher_norm, seen.resolution
        )
        labelled += kind.each_view * teachers * epochs * images
    weights = FLOAT * own.parameters
    batch = min(settings.training.batch_size, images)
    if who["set"] == CHOSEN and set(settings.twins) == {"distilled", "initial", "random"}:
        return Cost()  # whichever was chosen has a student of its own, who stands for this one
    whole_set = facts.num_images * _times_decoded(facts.num_images, epochs, settings)
    # What judging holds at a time, and what the teacher does beside a step.
    looked = min(frozen.together(seen.resolution), facts.judged) * own.passing
    helped = teachers * batch * taught.passing if taught and kind.each_view else 0.0
    return Cost(
        flops=epochs * images * (1 + flops.BACKWARD) * own.flops
        + (labelled * taught.flops if taught else 0.0)
        + whitening.flops(settings, epochs * images),
        decodes=facts.judged + (whole_set if whole else 0),
        steps=epochs * -(-images // batch),
        memory=held
        + COPIES * weights
        + (teachers * FLOAT * taught.parameters if taught else 0.0)
        + whitening.held(settings),
        activations=max(batch * own.activations + helped, looked),
        disk=(COPIES - 1) * weights,  # of a checkpoint, until the student is done
    )


def _held(which: str, images: int, facts: Facts, seen: Any) -> float:
    """Bytes of the images in memory: those it is trained on and those it is judged on, as far as
    each fit `data.memory_gb`. Random real ones are held whatever they take."""
    most, own = seen.memory_gb * 2**30, seen.decoded(images)
    judged = min(seen.decoded(facts.judged), most)
    return judged + (own if which == "random" else min(own, most))


def _times_decoded(images: int, epochs: int, settings: Any) -> int:
    """How often each image is decoded: once where all of them fit into `data.memory_gb`, else each
    epoch, and once more as what CutMix pastes."""
    return 1 if settings.images.fits(images) else epochs * (1 + settings.training.cutmix)


def _labelled(settings: Any, epochs: int, images: int, num_classes: int) -> int:
    """Passes of the teacher over all images before a student starts, where nobody else has made
    its labels: one for each epoch of stored ones, one a view of single ones. A student of a part of
    the classes needs one for others too.

    Labels of the distilled set are there: `relabel` has made them, but for short trials.
    """
    who, kind = settings.student, KINDS[settings.student["labels"]]
    made = who["set"] in ("distilled", CHOSEN) and "least_steps" not in settings
    if not kind.teacher or made:
        return 0
    if kind.views:
        turn, topk = min(settings.relabel.epochs or epochs, epochs), settings.relabel.topk
        kept = stored_bytes(kind.name, images, num_classes, turn, topk) or 0
        return turn if kept <= HELD else epochs
    if kind.name == SINGLE:
        return settings.relabel.views
    return 1 if "part" in who else 0


def grouping(settings: Any, facts: Facts) -> Cost:
    """Tables of the classes; the pass over some images is little. Asked before anything starts, so
    it is here that groups which the classes cannot make are refused."""
    asked = settings.grouping
    if asked.criterion == "given":
        criteria.check_given(asked.given, facts.num_classes)
    else:
        criteria.check(Wanted(asked.groups, asked.smallest), facts.num_classes)
    return Cost(memory=TABLES * DOUBLE * float(facts.num_classes) ** 2)


def verdict(settings: Any, facts: Facts) -> Cost:
    """The judged images and tables of their logits in memory: more of them for pairs of stages.
    What the judged networks cost is not known here, and little."""
    seen = settings.images
    held = min(seen.decoded(facts.judged), seen.memory_gb * 2**30)
    tables = 6 if "first" in settings else 2
    return Cost(memory=held + tables * FLOAT * facts.judged * facts.num_classes)
