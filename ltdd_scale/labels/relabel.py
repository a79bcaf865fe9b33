"""Stage "relabel": labels of the distilled images, or a note of how a student gets them."""

from __future__ import annotations

import dataclasses
from typing import Any

from ltdd_scale.data.distilled import Distilled
from ltdd_scale.data.loader import prepare
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.labels import labeller
from ltdd_scale.labels.catalog import KINDS, SINGLE, Kind
from ltdd_scale.labels.contract import Maker, label_key
from ltdd_scale.labels.settings import Views
from ltdd_scale.labels.views import view_spec
from ltdd_scale.runtime import files
from ltdd_scale.runtime.context import Context


def run(settings: Any, context: Context) -> dict[str, Any]:
    """Write ``labels.json`` (kind, seed, epochs, τ) and the files of the kind (`Kind.code`).

    Labels that belong to views come with single ones beside them: the set is of use to people
    without the teacher, or without our views, too.
    """
    kind = KINDS[settings.labels]
    facts = {"labels": kind.name, "seed": label_key(settings.seed), "epochs": 0, "tau": 0.0}
    if kind.of_set or kind.teacher:  # of classes nothing is made
        maker = _maker(kind, settings, context)
        facts |= kind.code().make(maker, context.out, context)
        if kind.of_views:
            single = dataclasses.replace(maker, relabel=settings.single)
            KINDS[SINGLE].code().make(single, context.out, context)
    if context.ranks.is_main:
        files.write_json(context.out / "labels.json", facts)
    return facts


def _maker(kind: Kind, settings: Any, context: Context) -> Maker:
    ranks, seen = context.ranks, settings.images
    split = ShardSplit(context.input("shard"), "train")
    num_classes = len(split.classes)
    held = Distilled(context.input("distilled"), num_classes)
    # Where no view is drawn, the teacher looks at whole images only.
    views = settings.views if "views" in settings else Views()
    return Maker(
        images=held.images(ranks.device, seen.memory_gb),
        teacher=labeller.load(context),
        normalize=prepare(split, ranks.device),
        spec=view_spec(views, seen.resolution, seen.mirror),
        views=views,
        relabel=settings.relabel if "relabel" in settings else None,
        num_classes=num_classes,
        train_counts=split.counts,
        seed=settings.seed,
        epochs=settings.student_epochs if "student_epochs" in settings else 0,
        ranks=ranks,
        temperature=settings.temperature if "temperature" in settings else None,
        learned=held.learned() if kind.of_set else None,
        tell=_Told(context),
    )


class _Told:
    """Passes over the images, one after the other, as progress that people see."""

    def __init__(self, context: Context):
        self.context, self.passes = context, 0

    def __call__(self, done: int, total: int) -> None:
        if done == 1:
            self.passes += 1
            title = f"relabel, pass {self.passes}"
            self.progress = self.context.progress(title, total, "batches")
        self.progress.update(done)
