"""Training on a distilled set alone, as its users do: without config, shards or store."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ltdd_scale.data import whitening
from ltdd_scale.data.images import MemoryImages
from ltdd_scale.data.loader import normalizer
from ltdd_scale.data.named import Named, read_images
from ltdd_scale.errors import UserError
from ltdd_scale.judging.metrics import metrics
from ltdd_scale.judging.settings import Training
from ltdd_scale.judging.student import build, joined, key_of
from ltdd_scale.judging.training import Setup, train
from ltdd_scale.labels.catalog import HARD, KINDS, Kind
from ltdd_scale.labels.contract import Maker
from ltdd_scale.labels.views import view_spec
from ltdd_scale.models import frozen, registry
from ltdd_scale.publish.set import TEACHER, find_teacher
from ltdd_scale.results import SOFTMAX
from ltdd_scale.runtime import files, ranks
from ltdd_scale.runtime.context import Context
from ltdd_scale.runtime.ranks import Ranks
from ltdd_scale.settings import parse

# Of Training: what a set was judged with that was given away before there were these settings.
BEFORE = {"soft_loss": "mse", "temperature": 1.0, "order": "both"}


@dataclass(frozen=True)
class Description:
    """What ``set.json`` tells of a set and of how it was judged. `folders` are the class folders,
    in label order, `train_counts` the images of each class that it was distilled from. `zca` is the
    file of the whitening that takes the place of `mean` and `std`, or nothing. `temperature`: where
    images are mixed, the softmax at it is mixed, or with None the logits."""

    classes: list[str]
    folders: list[str]
    train_counts: list[int]
    resolution: int
    mean: list[float]
    std: list[float]
    zca: str
    mirror: bool
    precision: str
    training: Training
    net: str
    width: int
    norm: str
    epochs: int
    temperature: float | None


@dataclass(frozen=True)
class Fitted:
    """A student that was trained on a set: `recipe` is what it is made of, `model` its averaged
    weights, `setup` how it was trained."""

    recipe: dict[str, Any]
    model: nn.Module
    setup: Setup


def run(
    distilled: Path,
    net: str | None,
    epochs: int | None,
    seed: int,
    test: Path | None,
    save: Path | None,
    labels: str | None = None,
) -> int:
    """Train `net` on the distilled set as it was judged; print its accuracy on `test`, write its
    weights to `save`. `labels`: another kind of label than the set's own. Returns the exit code."""
    told = describe(distilled)
    # What may be wrong is said before hours of training.
    judged = read_test(test, told) if test else None
    if save and not save.parent.is_dir():
        raise UserError(f"--save {save}: there is no folder {save.parent}")
    if save and save.is_dir():
        raise UserError(f"--save {save}: that is a folder; say the file too: {save / 'student.pt'}")
    peers = join(told)
    try:
        fitted = fit(distilled, told, peers, net=net, epochs=epochs, seed=seed, labels=labels)
    except KeyboardInterrupt:
        raise UserError("stopped; nothing was written, and the next try begins anew") from None
    if save:
        frozen.save(save, fitted.recipe, fitted.model)
        print(f"weights  {save}")
    if judged:
        result = judge(fitted, judged, peers)
        print(
            f"top-1 {result['top1']:.2f} %, balanced {result['balanced']:.2f} %, "
            f"top-5 {result['top5']:.2f} %, spread over classes {result['class_std']:.2f}, "
            f"{result['images']} images"
        )
    elif not save:
        print("trained, but neither --test nor --save was given: nothing to show")
    return 0


def join(told: Description) -> Ranks:
    """This process alone, on the GPU, or on all cores unless OMP_NUM_THREADS says how many."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(said) if said.isdecimal() and int(said) else len(os.sched_getaffinity(0))
    return ranks.join("auto", told.precision, threads)


def fit(
    distilled: Path,
    told: Description,
    peers: Ranks,
    *,
    net: str | None = None,
    epochs: int | None = None,
    seed: int = 0,
    labels: str | None = None,
) -> Fitted:
    """A student of `net` on the set in `distilled`; what is None is as the set was judged."""
    if epochs is not None and epochs < 1:
        raise UserError(f"--epochs {epochs}: at least 1")
    net = net or told.net
    registry.check(net, told.width, told.norm, told.resolution)
    setup = load(distilled, told, peers, epochs or told.epochs, f"{net} seed {seed}", seed, labels)
    recipe = frozen.recipe(net, told.width, told.norm, told.resolution, len(told.classes))
    student = build(recipe, setup.key)
    setup = joined(setup, student, told.resolution)
    # No checkpoints and no log: nothing is written but what was asked for.
    context = Context(peers, distilled / ".none", {}, "fit", float("inf"))
    model, _ = train(setup, peers.to_device(student), context)
    return Fitted(recipe, model, setup)


def describe(distilled: Path) -> Description:
    """What the set in the folder `distilled` tells of itself. Raises `UserError` where it is none,
    or where another version of ltdd_scale has written it."""
    if not (distilled / "set.json").exists():
        raise UserError(f"{distilled} is not a distilled set (no set.json in it)")
    told = files.read_json(distilled / "set.json")
    try:
        config = told["config"]
        evaluate = config["evaluate"]
        judged = {**BEFORE, **evaluate}
        asked = {name: judged[name] for name in Training.model_fields}
        training = parse(Training, asked, "evaluate.")
        direct = ("classes", "folders", "train_counts", "resolution", "mean", "std")
        return Description(
            **{name: told[name] for name in direct},
            zca=told.get("zca", ""),
            mirror=config["data"]["mirror"],
            precision=config["runtime"]["precision"],
            training=training,
            net=evaluate["nets"][0],
            width=evaluate["width"],
            norm=evaluate["norm"],
            epochs=evaluate["epochs"],
            # Sets that do not say it were judged with mixed logits, whatever the loss.
            temperature=training.kl_temperature if told.get("mixed") == SOFTMAX else None,
        )
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"{distilled / 'set.json'} does not say all that this version needs ({error!r}): "
            "write the set anew with it, by 'ltdd-scale run'"
        ) from None


def judged_folders(test: Path, told: Description) -> list[str]:
    """The folder of each class under `test`: of its own name, or of its folder's in the set. Where
    classes share a name, that of the set's folder tells them apart."""
    named = zip(told.classes, told.folders, strict=True)
    return [
        c if told.classes.count(c) == 1 and (test / c).is_dir() else folder for c, folder in named
    ]


def load(
    distilled: Path,
    told: Description,
    peers: Ranks,
    epochs: int,
    title: str,
    seed: int = 0,
    labels: str | None = None,
) -> Setup:
    """A student's training on the set, with the labels that came with it: its own kind, or
    `labels`. Raises `UserError` where the set has no such labels."""
    facts = files.read_json(distilled / "labels" / "labels.json")
    kind = KINDS.get(labels or facts["labels"])
    if kind is None:
        raise UserError(
            f"{distilled / 'labels' / 'labels.json'}: {facts['labels']!r} is none of "
            f"{', '.join(KINDS)}: a newer ltdd_scale may know it"
            if labels is None
            else f"--labels: {labels!r} is none of {', '.join(KINDS)}"
        )
    if kind.name != facts["labels"]:
        _check_labels(distilled, kind, facts["labels"])
    # Labels that were made before need no teacher, and hard ones come without.
    teacher = None
    if kind.each_view:
        path = find_teacher(distilled)
        teacher = frozen.load(path or distilled / TEACHER, peers)
    maker = _maker(distilled, told, teacher, peers)
    return Setup(
        images=maker.images,
        labels=kind.code().load(distilled / "labels", facts, maker),
        normalize=maker.normalize,
        spec=maker.spec,
        training=told.training,
        epochs=epochs,
        key=key_of(seed),
        title=title,
    )


def _check_labels(distilled: Path, kind: Kind, own: str) -> None:
    """Raise `UserError` where the set, whose own labels are `own`, has none of `kind`."""
    there = kind.name == HARD or (distilled / "labels" / f"{kind.name}.npy").exists()
    if kind.each_view:
        there = find_teacher(distilled) is not None
    if not there:
        raise UserError(f"--labels {kind.name}: the set has none such; its own are {own}")


def _maker(
    distilled: Path, told: Description, teacher: frozen.Frozen | None, peers: Ranks
) -> Maker:
    """What loading labels needs; nothing that only making them would."""
    pixels, classes = read_images(distilled / "images", told.folders, told.resolution)
    return Maker(
        images=MemoryImages(pixels, classes, peers.device),
        teacher=teacher,
        normalize=whitening.load(distilled / told.zca, peers.device)
        if told.zca
        else normalizer(told.mean, told.std, peers.device),
        spec=view_spec(told.training, told.resolution, told.mirror),
        views=told.training,
        relabel=None,
        num_classes=len(told.classes),
        train_counts=np.asarray(told.train_counts),
        seed=0,
        epochs=0,
        ranks=peers,
        temperature=told.temperature,
    )


def read_test(test: Path, told: Description) -> Named:
    """The images under test/<class>/, decoded. Raises `UserError` for a class without images and
    for an image that cannot be read."""
    return read_images(test, judged_folders(test, told), told.resolution)


def judge(fitted: Fitted, test: Named, peers: Ranks) -> dict[str, Any]:
    """`metrics` on the images `test`, and how many "images" these are."""
    pixels, truth = test
    held = MemoryImages(pixels, truth, peers.device)
    logits = frozen.predict(fitted.model, held, fitted.setup.normalize, peers)
    groups = ["many"] * fitted.recipe["num_classes"]
    return {**metrics(logits, truth, groups), "images": len(truth)}
