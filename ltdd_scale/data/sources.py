"""Where real images come from: any source with its long tail drawn, and what is known of it before
shards are written."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from ltdd_scale.data import longtail, shards
from ltdd_scale.data.catalog import SOURCES
from ltdd_scale.data.settings import Chosen, Data
from ltdd_scale.data.split import Available, Source
from ltdd_scale.errors import UserError
from ltdd_scale.stage import Facts

SLACK = 0.02  # share of the images by which a set may differ from what is expected of it


def kind(data: Chosen) -> Any:
    """The module that knows sources of this kind: see `data.catalog`."""
    return importlib.import_module(SOURCES[data.source])


def open_source(data: Data) -> Source:
    """The set that `data` describes, with validation images held out and the long tail drawn.

    Validation images come from the training images, before the long tail is drawn from the rest;
    the test split is as it is. Raises `UserError` on anything missing or inconsistent.
    """
    source: Source = kind(data).open_all(data)
    num_classes = len(source.classes)
    found = _available(source)
    _refuse_empty("training", found.train, source.classes)
    _refuse_empty("test", np.bincount(source.test.labels, minlength=num_classes), source.classes)
    counts = _drawn(data, found, source.classes)
    train, val = source.train, source.val
    if data.val_per_class and val is None:
        held = [data.val_per_class] * num_classes
        chosen = longtail.choose(train.labels, held, data.split_seed + 1)
        rest = np.setdiff1d(np.arange(len(train.names)), chosen)
        val, train = train.take(np.sort(chosen)), train.take(rest)
    if data.profile != "full":
        train = train.take(longtail.choose(train.labels, counts, data.split_seed))
    return Source(source.classes, train, source.test, val, source.notes)


def class_counts(data: Data) -> list[int]:
    """Training images of each class, long tail drawn. Raises `UserError` as `open_source` does."""
    return list(facts(data).counts)


def facts(data: Data) -> Facts:
    """What is known of the set before any shards are written; of a list without looking for its
    files. Raises `UserError` as `open_source` does."""
    if data.source == "shards":
        return shards.facts(Path(data.path))
    module = kind(data)
    if hasattr(module, "available"):
        found = module.available(data)
    else:
        found = _available(module.open_all(data))
    names = [str(c) for c in range(len(found.train))]
    return Facts(tuple(_drawn(data, found, names)), found.test)


def expected(data: Data) -> Facts | None:
    """What the config says of a set that is not here; None where it does not say enough.

    Raises `UserError` as `open_source` does where what it says leaves a class without images.
    """
    if data.profile == "counts" and data.source != "shards":
        return Facts(tuple(data.counts), data.expected_test)
    each = data.expected_per_class or data.max_per_class
    train = list(data.expected_counts) or [each] * data.expected_classes
    if not train or not all(train):
        return None
    if data.source == "shards":  # the long tail is drawn already
        return Facts(tuple(train), data.expected_test)
    found = Available(train, data.expected_test, bool(data.val_list))
    names = [str(c) for c in range(len(train))]
    return Facts(tuple(_drawn(data, found, names)), data.expected_test)


def surprise(data: Data, found: Facts) -> str:
    """In one line what the config expects and the set does not have; nothing where they agree.

    `found` is what is known of the set itself. A few images more or less, as where some do not
    decode, are no surprise.
    """
    try:
        thought = expected(data)
    except UserError as error:
        return f"data.expected_*: {error}"
    if thought is None or data.profile == "counts":
        return ""
    if thought.num_classes != found.num_classes:
        what = f"{thought.num_classes} classes, and the set has {found.num_classes}"
    elif abs(thought.num_images - found.num_images) > SLACK * found.num_images:
        what = f"{thought.num_images:,} training images, and the set has {found.num_images:,}"
    elif data.expected_test and abs(thought.judged - found.judged) > SLACK * found.judged:
        what = f"{thought.judged:,} test images, and the set has {found.judged:,}"
    else:
        return ""
    return f"data.expected_*: the config expects {what}; the set counts, correct the config"


def _available(source: Source) -> Available:
    counts = np.bincount(source.train.labels, minlength=len(source.classes)).tolist()
    return Available(counts, len(source.test.names), source.val is not None)


def _drawn(data: Chosen, found: Available, classes: list[str]) -> list[int]:
    """Training images of each class once validation images are held out and the tail is drawn."""
    # The largest class counts as it was, also when some of it is held out: settings are then
    # chosen on the long tail that they are for.
    largest = data.max_per_class or max(found.train)
    rest = list(found.train)
    if data.val_per_class and not found.validated:
        if min(rest) <= data.val_per_class:
            c = int(np.argmin(rest))
            raise UserError(
                f"data.val_per_class={data.val_per_class} leaves nothing of class {c} "
                f"({classes[c]}, {rest[c]} images)"
            )
        rest = [n - data.val_per_class for n in rest]
    return longtail.counts_for(data.profile, rest, data.imbalance_factor, largest, data.counts)


def _refuse_empty(kind: str, counts: Any, classes: list[str]) -> None:
    empty = np.flatnonzero(np.asarray(counts) == 0)
    if len(empty):
        c = int(empty[0])
        raise UserError(
            f"class {c} ({classes[c]}) has no {kind} images ({len(empty)} such classes)"
        )
