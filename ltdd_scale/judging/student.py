"""Stage "student": one network trained from scratch on one set of images, and judged once.

The set is the distilled images, those they started from, random real images of the same IPC, those
of them that were chosen, or the whole long-tailed set. Under the protocol two_stage a student may
tell apart a part of the classes only (`subsets.py`). Nothing is chosen on the test set: the last
weights count.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ltdd_scale.data import chosen, distilled
from ltdd_scale.data.images import Images, MemoryImages
from ltdd_scale.data.loader import open_images, prepare, some_images
from ltdd_scale.data.shards import ShardSplit
from ltdd_scale.judging import choice
from ltdd_scale.judging.lengths import epochs_of
from ltdd_scale.judging.metrics import logit_adjusted, metrics
from ltdd_scale.judging.saved import AS, LOGITS
from ltdd_scale.judging.settings import Training
from ltdd_scale.judging.subsets import Part, part_of
from ltdd_scale.judging.training import Setup, train
from ltdd_scale.labels import labeller
from ltdd_scale.labels.catalog import KINDS
from ltdd_scale.labels.contract import Labels, Maker
from ltdd_scale.labels.views import view_spec
from ltdd_scale.models import frozen, registry
from ltdd_scale.results import CHOSEN, NUMBERS, WHOLE_SETS, Student
from ltdd_scale.runtime import files, signals
from ltdd_scale.runtime.context import Context

PLAIN = "plain"  # the set of the plain network, which is judged with logit adjustment too
WEIGHTS = "weights.pt"
HALF_MAX = 65504.0  # the largest number of float16


def check(settings: Any) -> None:
    """Raises `UserError` for a net that is unknown, or too deep for the resolution."""
    net, size = settings.student["net"], settings.images.resolution
    registry.check(net, settings.width, settings.norm, size)


def run(settings: Any, context: Context) -> dict[str, Any]:
    """Train and judge one student; write ``result.json`` with its row and its losses, its logits of
    the judged images, and its weights.

    It is judged by the logits as they are kept: who reads them finds the same numbers.
    """
    who, ranks = Student(**settings.student), context.ranks
    if who.set == CHOSEN:
        which = choice.chosen_for(context.input("images"), who.labels)
        if which in settings.twins:  # their student stands for this one
            row = {**who.to_dict(), AS: which}
            files.write_json(context.out / "result.json", {"row": row, "loss": []})
            return {"note": f"the student of {choice.CALLED[which]} images"}
    split = ShardSplit(context.input("shard"), "train")
    part = part_of(who.part, context.input("grouping")) if who.part else None
    setup = _setup(who, settings, context, split, part)
    shape = (settings.width, settings.norm, settings.images.resolution)
    num_classes = part.num_classes if part else len(split.classes)
    recipe = frozen.recipe(who.net, *shape, num_classes)
    network = build(recipe, setup.key)
    setup = joined(setup, network, settings.images.resolution)
    if part and registry.norm_layers(network):
        setup = dataclasses.replace(setup, joins=True)
    average, history = train(setup, ranks.to_device(network), context)
    held, groups = ShardSplit(context.input("shard"), settings.split), split.manifest["groups"]
    test = open_images(held, settings.images, ranks.device, context.workers)
    # Half precision has no larger numbers: beyond them all are infinite, and none the largest.
    kept = frozen.predict(average, test, setup.normalize, ranks).clamp(-HALF_MAX, HALF_MAX).half()
    logits = kept.float()
    result = metrics(logits, held.labels, groups) if part is None else _of_part(part, logits, held)
    row = {**who.to_dict(), "ipc": settings.ipc if "ipc" in settings else None, **result}
    if who.set == PLAIN and part is None:
        row["adjusted"] = metrics(logit_adjusted(logits, split.counts), held.labels, groups)
    losses = [round(loss, 5) for loss in history]
    frozen.save(context.out / WEIGHTS, recipe, average)
    distilled.save(context.out / LOGITS, kept.numpy())
    files.write_json(context.out / "result.json", {"row": row, "loss": losses})
    shown = {name: result[name] for name in ("top1", "balanced", "class_std")}
    return {**shown, "note": _note(**shown)}


def joined(setup: Setup, network: nn.Module, resolution: int) -> Setup:
    """`setup` for `network`: BatchNorm has little to learn from one image, and nothing where its
    maps are one pixel. Only there an image that would be a step alone joins the step before it:
    elsewhere that would change published numbers."""
    small = not registry.trains_on_one(network, resolution)
    return dataclasses.replace(setup, joins=True) if small else setup


def key_of(seed: int, part: str = "") -> str:
    """The key of all random draws of the student with this seed."""
    return f"student {seed} {part}" if part else f"student {seed}"


def build(recipe: dict[str, Any], key: str) -> nn.Module:
    """A student of a recipe (`frozen.recipe`), with initial weights that depend on `key` alone."""

    def made() -> nn.Module:
        shape = (recipe["width"], recipe["norm"], recipe["resolution"])
        return registry.Student(registry.backbone(recipe["net"], *shape), recipe["num_classes"])

    return registry.seeded(made, key, "weights")


def _of_part(part: Part, logits: Tensor, held: ShardSplit) -> dict[str, Any]:
    """`metrics` of logits [N, C'] of the part's own classes, on the judged images of them; none of
    them many, medium or few. Empty where there are no such images."""
    members = part.members(held.labels)
    if not len(members):
        return dict.fromkeys(NUMBERS) | {"per_class": [None] * part.num_classes}
    own = part.own(held.labels[members])
    return metrics(logits[torch.from_numpy(members)], own, [""] * part.num_classes)


def _setup(
    who: Student, settings: Any, context: Context, split: ShardSplit, part: Part | None
) -> Setup:
    images, seen = _images(who, settings, context, split), settings.images
    # Of classes no more is given than matters there.
    training = Training(**settings.training.model_dump())
    epochs = epochs_of(settings, len(images.labels))
    normalize = prepare(split, context.ranks.device, context.inputs.get("zca"))
    maker = Maker(
        images=images,
        teacher=labeller.load(context),
        normalize=normalize,
        spec=view_spec(training, seen.resolution, seen.mirror),
        views=training,
        relabel=settings.relabel if "relabel" in settings else None,
        num_classes=len(split.classes),
        train_counts=split.counts,
        seed=settings.seed if "seed" in settings else 0,
        epochs=epochs,
        ranks=context.ranks,
        temperature=training.kl_temperature,
        learned=_learned(who, context, len(split.classes)),
        tell=lambda done, total: signals.check(),
    )
    labels = _labels(who.labels, maker, context)
    if part is not None:
        images, labels = part.of(images, labels)
    return Setup(
        images=images,
        labels=labels,
        normalize=normalize,
        spec=maker.spec,
        training=training,
        epochs=epochs,
        key=key_of(who.seed, who.part),
        title=who.title,
    )


def _learned(who: Student, context: Context, num_classes: int) -> np.ndarray | None:
    """The labels that the set brings, where this student is to learn from them and relabel has not
    copied them."""
    if not KINDS[who.labels].of_set or "labels" in context.inputs:
        return None
    return distilled.Distilled(context.input("images"), num_classes).learned()


def _labels(kind: str, maker: Maker, context: Context) -> Labels:
    """The labels that relabel has made, where they are of this kind, else made here likewise."""
    code = KINDS[kind].code()
    if "labels" not in context.inputs:
        return code.fresh(maker)
    folder = context.input("labels")
    return code.load(folder, files.read_json(folder / "labels.json"), maker)


def _images(who: Student, settings: Any, context: Context, split: ShardSplit) -> Images:
    device, seen = context.ranks.device, settings.images
    if "images" in context.inputs:
        held = distilled.Distilled(context.input("images"), len(split.classes))
        return held.images(device, seen.memory_gb)
    if who.set in WHOLE_SETS:
        return open_images(split, seen, device, context.workers)
    drawn = chosen.random_real(split.labels, len(split.classes), settings.ipc, who.seed)
    pixels = some_images(split, drawn, seen, device, context.workers)
    return MemoryImages(pixels, split.labels[drawn], device)


def _note(top1: float | None, balanced: float | None, class_std: float | None) -> str:
    if top1 is None:
        return "no image to judge it by"
    return f"{top1:.1f} % (balanced {balanced:.1f}, spread over classes {class_std:.1f})"
